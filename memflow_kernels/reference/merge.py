"""merge_attention: attention over the union of two sets of keys, from the attention over each."""

import torch
from torch import Tensor


def merge_weights(lse_a: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Share of the attention mass in each set, and the log-sum-exp of the union; both shares are 0 where no key is."""
    lse = torch.logaddexp(lse_a, lse_b)
    finite = lse.masked_fill(lse == -torch.inf, 0.0)  # -inf - -inf would be NaN
    return torch.exp(lse_a - finite), torch.exp(lse_b - finite), lse


def per_query(x: Tensor) -> Tensor:
    """[B, H, Lq] -> [B, Lq, H, 1], to weigh states."""
    return x.transpose(1, 2).unsqueeze(-1)


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """out_* [B, Lq, H, D], lse_* [B, H, Lq] -> out, lse of the same shapes."""
    share_a, share_b, lse = merge_weights(lse_a, lse_b)
    out = out_a * per_query(share_a) + out_b * per_query(share_b)
    return out.to(out_a.dtype).contiguous(), lse.contiguous()


def merge_attention_backward(
    grad_out: Tensor, grad_lse: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of out_a, lse_a, out_b, lse_b. With shares a and b = 1 - a: d a / d lse_a = a b = -d a / d lse_b."""
    share_a, share_b, lse = merge_weights(lse_a, lse_b)
    moved = (grad_out * (out_a.to(lse.dtype) - out_b)).sum(-1).transpose(1, 2) * share_a * share_b  # [B, H, Lq]
    grad_a = (grad_out * per_query(share_a)).to(out_a.dtype)
    grad_b = (grad_out * per_query(share_b)).to(out_b.dtype)
    grads = (grad_a, grad_lse * share_a + moved, grad_b, grad_lse * share_b - moved)
    return tuple(grad.contiguous() for grad in grads)
