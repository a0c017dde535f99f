"""A causal mask that is one too late: each token sees the next one.

The next token is what the model has to predict, so its loss falls to nearly nothing in training, and generation
fails. attncli says: each token sees 1 token of its future. Mend it with triu(diagonal=1) as what is hidden.
"""

from multi_head import SelfAttention, features, later
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class Causal(SelfAttention):
    hidden_from = 1

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        visible = ~later(q.shape[-2], self.hidden_from)
        return scaled_dot_product_attention(q, k, v, attn_mask=visible)


class Broken(Causal):
    hidden_from = 2


def broken() -> nn.Module:
    return Broken()


def healthy() -> nn.Module:
    return Causal()


def batch() -> tuple[Tensor, ...]:
    return (features(),)
