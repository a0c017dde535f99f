"""ggml's tensor types: what a type id of a GGUF file means, and how many bytes a block of it takes."""

from __future__ import annotations

from typing import NamedTuple


class BlockType(NamedTuple):
    """One ggml type: `elements` consecutive elements of a row share one block of `size_bytes`."""

    dtype: str
    elements: int
    size_bytes: int


# ggml's type ids (enum ggml_type), complete to gguf 0.19. 31 to 33 and 36 to 38 were repacked copies for some
# processors, since removed; the blocks have the size of their originals.
GGML_TYPES: dict[int, BlockType] = {
    0: BlockType("float32", 1, 4),
    1: BlockType("float16", 1, 2),
    2: BlockType("q4_0", 32, 18),
    3: BlockType("q4_1", 32, 20),
    6: BlockType("q5_0", 32, 22),
    7: BlockType("q5_1", 32, 24),
    8: BlockType("q8_0", 32, 34),
    9: BlockType("q8_1", 32, 40),
    10: BlockType("q2_k", 256, 84),
    11: BlockType("q3_k", 256, 110),
    12: BlockType("q4_k", 256, 144),
    13: BlockType("q5_k", 256, 176),
    14: BlockType("q6_k", 256, 210),
    15: BlockType("q8_k", 256, 292),
    16: BlockType("iq2_xxs", 256, 66),
    17: BlockType("iq2_xs", 256, 74),
    18: BlockType("iq3_xxs", 256, 98),
    19: BlockType("iq1_s", 256, 50),
    20: BlockType("iq4_nl", 32, 18),
    21: BlockType("iq3_s", 256, 110),
    22: BlockType("iq2_s", 256, 82),
    23: BlockType("iq4_xs", 256, 136),
    24: BlockType("int8", 1, 1),
    25: BlockType("int16", 1, 2),
    26: BlockType("int32", 1, 4),
    27: BlockType("int64", 1, 8),
    28: BlockType("float64", 1, 8),
    29: BlockType("iq1_m", 256, 56),
    30: BlockType("bfloat16", 1, 2),
    31: BlockType("q4_0_4_4", 32, 18),
    32: BlockType("q4_0_4_8", 32, 18),
    33: BlockType("q4_0_8_8", 32, 18),
    34: BlockType("tq1_0", 256, 54),
    35: BlockType("tq2_0", 256, 66),
    36: BlockType("iq4_nl_4_4", 32, 18),
    37: BlockType("iq4_nl_4_8", 32, 18),
    38: BlockType("iq4_nl_8_8", 32, 18),
    39: BlockType("mxfp4", 32, 17),
    40: BlockType("nvfp4", 64, 36),
    41: BlockType("q1_0", 128, 18),
}
