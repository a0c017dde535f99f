"""Parameter names → attention sites: which tensors belong together and what role each plays.

A site needs its tensors to *pair up* (q_proj beside k_proj beside v_proj, whatever the spelling), so that a
lone `query` or `key` is never taken for attention. Names that follow the pattern of swapping q → k → v
need no entry here; only names that cannot be guessed from their shape do, and they are in the tables at the
foot. This file must not know configs, head counts or families.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from attncli.layout.leaves import EXACT, PROJECTIONS, places, prefix_of
from attncli.records import Tensor


class Site(NamedTuple):
    """The tensors of one attention layer by role; biases under `q_bias`, `qkv_bias` …

    `container`: the module that holds the projections. `path`: the common prefix of projections and output.
    `spelling`: how q is spelled there ("{q}_proj"), or the fused leaf ("c_attn").
    `mechanism`: "softmax" | "linear-attention" | "ssm" | "deformable". `two_streams`: each of two inputs
    attends to the other.
    """

    path: str
    container: str
    spelling: str
    roles: Mapping[str, Tensor]
    mechanism: str = "softmax"
    two_streams: bool = False


@dataclass(slots=True)
class _Member:
    role: str
    spelling: str
    leaf: str
    param: str
    tensor: Tensor


def attention_sites(tensors: Iterable[Tensor]) -> list[Site]:
    """Every attention site, in the order in which its first tensor appears."""
    containers: dict[str, list[_Member]] = defaultdict(list)
    for tensor in tensors:
        for place in places(tensor.name):
            containers[place.container].append(
                _Member(place.role, place.spelling, place.leaf, place.param, tensor)
            )
    drafts: list[Site] = []
    for container, members in containers.items():
        if _LEADING_ROLES.isdisjoint([member.role for member in members]):
            continue  # the experts of a large model: a gate, and nothing to attend with
        drafts.extend(_sites_in(container, members, containers))
    return _with_unique_paths(_drop_lone_queries(drafts))


def template(path: str) -> str:
    """`path` with its last number replaced by "#": layers of one stack share it."""
    head, digits, tail = _last_number(path)
    return f"{head}#{tail}" if digits else path


def layer_index(path: str) -> int | None:
    """The number of the layer in its stack: the last whole segment of `path` that is a number."""
    digits = _last_number(path)[1]
    return int(digits) if digits else None


@lru_cache(maxsize=65536)
def _last_number(path: str) -> tuple[str, str, str]:
    matches = list(re.finditer(r"(?:(?<=^)|(?<=[._]))\d+(?=[._]|$)", path))
    # "attention.0" inside a block is not the block's number when a block number stands before it.
    if not matches:
        return path, "", ""
    chosen = matches[-1]
    for match in matches:
        if re.search(
            r"(^|\.)(layers?|h|blocks?|blk|resblocks|decoder_layers|encoder_layers)\.$", path[: match.start()]
        ):
            chosen = match
    return path[: chosen.start()], chosen.group(), path[chosen.end() :]


# --- one module ---------------------------------------------------------------------------------------


def _sites_in(
    container: str, members: Sequence[_Member], containers: Mapping[str, list[_Member]]
) -> list[Site]:
    if _NOT_ATTENTION.search(container):
        return []
    weights: dict[str, list[_Member]] = defaultdict(list)
    for member in members:
        if member.param != "bias":
            weights[member.role].append(member)
    mechanism = _mechanism(container, members, weights)
    if mechanism is not None:
        return [_other_mechanism(container, mechanism, members)]
    irregular = _irregular(weights)
    if irregular:
        return [_build(container, irregular, members, containers)._replace(two_streams=True)]
    if _is_mla(weights):
        chosen = {role: weights[role][0] for role in _MLA_ROLES if weights.get(role)}
        if weights.get("q") and "q_b" not in chosen:
            chosen["q"] = weights["q"][0]
        return [_build(container, chosen, members, containers)]
    return [_build(container, chosen, members, containers) for chosen in _groups(container, weights, members)]


def _groups(
    container: str, weights: Mapping[str, list[_Member]], members: Sequence[_Member]
) -> list[dict[str, _Member]]:
    """Sets of projections that pair up; additional ones of the same attention are added as extra roles."""
    fused = [m for m in weights.get("qkv", ()) if _fused_is_plausible(container, m, members)]
    by_spelling: dict[str, dict[str, _Member]] = defaultdict(dict)
    for role in ("q", "k", "v"):
        for member in weights.get(role, ()):
            if len(member.tensor.shape) >= 2:
                by_spelling[member.spelling].setdefault(role, member)
    triples = [group for group in by_spelling.values() if set(group) == {"q", "k", "v"}]
    if fused:
        fused.sort(key=lambda m: (not m.leaf.startswith(("gqkv", "qkv", "in_proj", "to_qkv")), len(m.leaf)))
        queries = [m for m in weights.get("q", ()) if m.leaf == "q_attn"]
        if queries and fused[0].leaf == "c_attn":  # GPT-2's cross-attention: q apart, c_attn = [K | V]
            return [{"q": queries[0], "kv": fused[0]}]
        first = fused[0]
        groups = [{"qkv": first}]
        for other in fused[1:]:
            if re.fullmatch(r"qkv_[a-z]", other.leaf) and re.fullmatch(r"qkv_[a-z]", first.leaf):
                groups[0]["added_qkv"] = other  # a second stream in one joint attention
            elif prefix_of(other.leaf) != prefix_of(first.leaf):
                groups.append({"qkv": other})
        if not triples:
            return groups
        # A fused tensor beside a full triple (`multihead_attn` inside a cross-attention) is its own attention.
        return groups + triples[:1]
    if triples:
        triples.sort(key=lambda group: len(group["q"].leaf))
        own = [g for g in triples if not _EXTRA_SET.search(g["q"].leaf)] or triples[:1]
        return [own[0], *[g for g in own[1:] if prefix_of(g["q"].leaf)]]
    q, k, v, kv, qk = (list(weights.get(role, ())) for role in ("q", "k", "v", "kv", "qk"))
    q = [m for m in q if len(m.tensor.shape) >= 2]
    if q and q[0].leaf.startswith("linears.") and not re.search(r"att(n|ention)|mha", container.lower()):
        return []
    if q and k and v:
        return [
            group
            for prefix in dict.fromkeys(prefix_of(m.leaf) for m in q)
            if (group := _mixed(prefix, q, k, v))
        ]
    if q and kv:
        return [{"q": _primary(q), "kv": kv[0]}]
    if qk and v:
        return [{"qk": qk[0], "v": _primary(v)}]
    if weights.get("q_b") and kv:
        return [
            {"q_a": weights["q_a"][0], "q_b": weights["q_b"][0], "kv": kv[0]}
            if weights.get("q_a")
            else {"q": weights["q_b"][0], "kv": kv[0]}
        ]
    if kv and weights.get("q_experts"):
        return [{"q": weights["q_experts"][0], "kv": kv[0]}]
    learned = weights.get("learned_q")
    if k and v and learned and not q and k[0].spelling == v[0].spelling:
        return [{"q_learned": learned[0], "k": k[0], "v": v[0]}]
    partial = {role: _primary(found) for role, found in (("q", q), ("k", k), ("v", v)) if found}
    spellings = {m.spelling for m in partial.values()}
    adapter = any(m.tensor.scheme == "lora" for m in partial.values())
    if (
        len(spellings) == 1
        and partial
        and (adapter or (q and weights.get("o")) or (q and k) or (len(partial) == 2 and weights.get("o")))
    ):
        return [partial]
    return []


def _mixed(
    prefix: str, q: Sequence[_Member], k: Sequence[_Member], v: Sequence[_Member]
) -> dict[str, _Member] | None:
    """q, k and v of one prefix whose spellings differ (content and position apart, one stream's own keys)."""
    ours = [
        [m for m in found if prefix_of(m.leaf) == prefix] or ([] if prefix else list(found))
        for found in (q, k, v)
    ]
    if not all(ours):
        return None
    query = _primary(ours[0])
    key = next((m for m in ours[1] if m.spelling == query.spelling), ours[1][0])
    return {"q": query, "k": key, "v": _primary(ours[2])}


def _primary(members: Sequence[_Member]) -> _Member:
    return min(
        members,
        key=lambda m: (
            "content" not in m.leaf and "pos_" in m.leaf,
            bool(_EXTRA_SET.search(m.leaf)),
            len(m.leaf),
        ),
    )


def _fused_is_plausible(container: str, member: _Member, members: Sequence[_Member]) -> bool:
    shape = member.tensor.shape
    if len(shape) < 2:
        return False
    if member.leaf == "attn":
        return container.endswith(".attn") and any(m.role == "o" for m in members)
    if member.leaf in ("in_proj", "linear1"):
        leaves = {m.leaf for m in members}
        if member.leaf == "linear1":
            return "linear2" in leaves and bool(
                re.search(r"single_", container) or "norm.query_norm" in leaves
            )
        if "attn_out_proj" in leaves:
            return True
        parent = container.lower().removesuffix(".self").rpartition(".")[2]
        return bool(re.search(r"attn|attention", parent)) and shape[0] == 3 * shape[1]
    return True


def _is_mla(weights: Mapping[str, list[_Member]]) -> bool:
    return bool(
        weights.get("kv_a")
        and (weights.get("kv_b") or weights.get("k_b"))
        and (weights.get("q") or weights.get("q_b"))
    )


def _irregular(weights: Mapping[str, list[_Member]]) -> dict[str, _Member] | None:
    chosen = {role[len("bi_") :]: found[0] for role, found in weights.items() if role.startswith("bi_")}
    return chosen if {"q", "k", "v"} <= set(chosen) else None


def _mechanism(
    container: str, members: Sequence[_Member], weights: Mapping[str, list[_Member]]
) -> str | None:
    """What this module is when it is not softmax attention; None when it may be."""
    roles = {m.role for m in members}
    projections = any(
        m.leaf != "in_proj" for role in ("q", "qkv", "kv", "q_b") for m in weights.get(role, ())
    )
    if "sampling_offsets" in roles:
        return "deformable"
    if "gdn" in roles or ("time_decay" in roles) or "additive_weight" in roles:
        return "linear-attention"
    lowered = container.lower()
    if projections and (
        re.search(r"(^|[._])(linear_attn|mlstm|lightning|delta_?net|gated_delta|gla|mlstm_layer)", lowered)
        or ("a_log" in roles)
        or "lightning_gate" in roles
    ):
        return "linear-attention"
    if projections and any(m.role == "qkv" and _is_one_plus_two(m.tensor.shape) for m in members):
        return "linear-attention"
    if "a_log" in roles and not projections and {"ssm_in", "ssm_dt", "ssm_x", "conv1d", "qkv"} & roles:
        return "ssm"
    return None


def _is_one_plus_two(shape: tuple[int, ...]) -> bool:
    """MobileViTv2's separable attention: one context score, then keys and values of the full width."""
    return len(shape) >= 2 and shape[0] == 2 * shape[1] + 1


def _other_mechanism(container: str, mechanism: str, members: Sequence[_Member]) -> Site:
    roles: dict[str, Tensor] = {}
    for member in members:
        role = "in_proj" if mechanism == "ssm" and member.role == "qkv" else member.role
        roles.setdefault(_with_bias(role, member), member.tensor)
    return Site(path=container, container=container, spelling="", roles=roles, mechanism=mechanism)


def _build(
    container: str,
    chosen: Mapping[str, _Member],
    members: Sequence[_Member],
    containers: Mapping[str, list[_Member]],
) -> Site:
    """The site around the projections `chosen`: its output, biases, norms, and whatever else stands beside it."""
    lead = next(iter(chosen.values()))
    prefix = _attention_prefix(lead)
    output, parents = _output(container, lead, prefix, members, containers)
    roles: dict[str, Tensor] = {role: m.tensor for role, m in chosen.items()}
    if output is not None:
        roles["o"] = output.tensor
    taken = {tensor.name for tensor in roles.values()}
    around = [m for parent in parents for m in containers.get(parent, ())]
    for inside, member in [*((True, m) for m in members), *((False, m) for m in around)]:
        bias = _bias_role(member, chosen, output)
        # In a flat namespace each prefix is an attention of its own.
        ours = not prefix or prefix_of(member.leaf) in ("", prefix)
        if bias:
            roles.setdefault(bias, member.tensor)
        elif member.tensor.name in taken or not ours:
            continue
        elif member.role in ("q", "k", "v"):
            if inside:
                roles.setdefault(_with_bias(f"added_{member.role}", member), member.tensor)
        elif member.role not in PROJECTIONS:
            roles.setdefault(_with_bias(member.role, member), member.tensor)
    path = _common_prefix(
        [m.tensor.name for m in (*chosen.values(), *([output] if output else []))], container
    )
    return Site(path=path, container=container, spelling=lead.spelling, roles=roles)


def _with_bias(role: str, member: _Member) -> str:
    return f"{role}_bias" if member.param == "bias" else role


def _attention_prefix(lead: _Member) -> str:
    """What stands before q in a flat name: "cross_attn_" of GGUF's `cross_attn_q`; "" in "q_proj"."""
    if lead.role not in ("q", "k", "v", "q_a") and not lead.leaf.endswith("qkv"):
        return ""
    return prefix_of(lead.leaf)


def _bias_role(member: _Member, chosen: Mapping[str, _Member], output: _Member | None) -> str | None:
    bare = {"in_proj_bias": "in_proj_weight"}
    for role, lead in chosen.items():
        if member.param == "bias" and member.leaf == lead.leaf and member.spelling == lead.spelling:
            return f"{role}_bias"
        if bare.get(member.leaf) == lead.leaf:
            return f"{role}_bias"
    if member.leaf == "in_proj_bias" and "q" in chosen and chosen["q"].leaf == "q_proj_weight":
        return "qkv_bias"
    if output is None or member.param != "bias" or member.role != output.role:
        return None
    same_module = member.tensor.name.rsplit(".", 1)[0] == output.tensor.name.rsplit(".", 1)[0]
    return "o_bias" if same_module else None


def _output(
    container: str,
    lead: _Member,
    prefix: str,
    members: Sequence[_Member],
    containers: Mapping[str, list[_Member]],
) -> tuple[_Member | None, list[str]]:
    """The output projection, and the outer modules that belong to this attention (`attention` of `attention.self`)."""
    own = [m for m in members if m.role == "o" and m.param != "bias" and len(m.tensor.shape) >= 2]
    parents: list[str] = []
    best = _best_output(own, lead, prefix)
    if best is not None:
        return best, parents
    current = container
    while "." in current and current.rsplit(".", 1)[1] in _INNER_MODULES:
        current = current.rsplit(".", 1)[0]
        parents.append(current)
        outer = containers.get(current, ())
        candidates = [m for m in outer if m.role == "o" and m.param != "bias" and m.leaf in _OUTER_OUTPUTS]
        best = _best_output(candidates, lead, prefix)
        if best is not None:
            return best, parents
        if any(m.role in ("q", "k", "v", "qkv") and m.param != "bias" for m in outer):
            return None, parents[:-1]
    return None, []


def _best_output(candidates: Sequence[_Member], lead: _Member, prefix: str) -> _Member | None:
    if not candidates:
        return None
    paired = [m for m in candidates if m.spelling == lead.spelling]
    if paired:
        return paired[0]
    if prefix:
        candidates = [m for m in candidates if m.leaf.startswith((prefix, prefix.rstrip("_") + "."))]
    else:
        candidates = [m for m in candidates if not m.leaf.startswith("cross_attn_")]
    order = list(EXACT)
    return min(candidates, key=lambda m: order.index(m.leaf) if m.leaf in EXACT else len(order), default=None)


def _common_prefix(names: Sequence[str], container: str) -> str:
    if len(names) == 1:
        return container
    split = [name.split(".")[:-1] for name in names]
    common: list[str] = []
    for segments in zip(*split, strict=False):
        if len(set(segments)) != 1:
            break
        common.append(segments[0])
    path = ".".join(common)
    return path if len(path) < len(container) else container


def _drop_lone_queries(sites: list[Site]) -> list[Site]:
    """A site without keys stays only if its stack has complete siblings (shared keys, or a missing tensor)."""
    complete = {
        (template(site.path), site.spelling)
        for site in sites
        if {"q", "k", "v"} <= set(site.roles) or {"q", "k", "o"} <= set(site.roles)
    }
    kept = []
    for site in sites:
        partial = site.mechanism == "softmax" and bool({"q", "k", "v"} & set(site.roles))
        whole = {"q", "k", "v"} <= set(site.roles) or bool(
            {"qkv", "kv", "qk", "kv_a", "q_learned", "q_b"} & set(site.roles)
        )
        lora = any(tensor.scheme == "lora" for tensor in site.roles.values())
        if whole or not partial or lora or (template(site.path), site.spelling) in complete:
            kept.append(site)
    return kept


def _with_unique_paths(sites: list[Site]) -> list[Site]:
    counts: dict[str, int] = defaultdict(int)
    for site in sites:
        counts[site.path] += 1
    out = []
    taken: set[str] = set()
    for site in sites:
        path = site.path
        if counts[path] > 1:
            stem = re.sub(r"[._]?\{.*", "", site.spelling) or site.spelling
            path = f"{path}.{stem}" if path else stem
        number = 2
        unique = path
        while unique in taken:
            unique = f"{path}#{number}"
            number += 1
        taken.add(unique)
        out.append(site._replace(path=unique))
    return out


# --- tables -------------------------------------------------------------------------------------------

_MLA_ROLES = ("q_a", "q_b", "kv_a", "kv_b", "k_b", "v_b")
# Modules that hold only the projections while their parent holds the output projection.
_INNER_MODULES = frozenset(
    "self attention attn att self_attention self_attn longformer_self_attn inner_attn core_attention qkv_proj "
    "attention_self SelfAttention".split()
)
_OUTER_OUTPUTS = frozenset(
    "output.dense output o_proj out_proj dense proj post output_projection.o_proj self_output.dense".split()
)
# An additional set inside one attention: joint text stream, image prompt, global tokens, layout.
_EXTRA_SET = re.compile(r"(^|_)(add|added|layout|global|ip|txt|pos)(_|$)")
# Parts of an attention that choose or compress keys and weigh no values themselves.
_NOT_ATTENTION = re.compile(r"(^|\.)(indexer|compressor)(\.|$)")
# Without one of these a module is no site of any mechanism.
_LEADING_ROLES = frozenset(
    "q k v qkv kv qk q_a q_b kv_a kv_b k_b v_b q_experts bi_q sampling_offsets gdn time_decay additive_weight "
    "a_log".split()
)
