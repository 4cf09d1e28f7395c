"""merge_attention: attention over the union of two sets of keys, from the attention over each."""

import torch
from torch import Tensor


def merge_weights(lse_a: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Share of the attention mass in each set, and the log-sum-exp of the union; both shares are 0 where no key is.

    The masses are divided by their sum: exp(lse_a - lse) would be off by the rounding of lse, which grows with it.
    A log-sum-exp of +inf is another mark of a set without keys.
    """
    lse_a, lse_b = (lse.masked_fill(lse == torch.inf, -torch.inf) for lse in (lse_a, lse_b))
    top = torch.maximum(lse_a, lse_b)
    top = top.masked_fill(top == -torch.inf, 0.0)  # -inf - -inf would be NaN
    mass_a, mass_b = torch.exp(lse_a - top), torch.exp(lse_b - top)
    mass = mass_a + mass_b
    divisor = mass.masked_fill(mass == 0, 1.0)
    return mass_a / divisor, mass_b / divisor, top + mass.log()


def per_query(x: Tensor) -> Tensor:
    """[B, H, Lq] -> [B, Lq, H, 1], to weigh states."""
    return x.transpose(1, 2).unsqueeze(-1)


def weighed(states: Tensor, share: Tensor) -> Tensor:
    """states [B, Lq, H, D] times share [B, H, Lq]; 0 where the share is 0, whatever the states hold there."""
    share = per_query(share)
    return (states * share).masked_fill_(share == 0, 0.0)


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """out_* [B, Lq, H, D], lse_* [B, H, Lq] -> out, lse of the same shapes."""
    share_a, share_b, lse = merge_weights(lse_a, lse_b)
    if lse.device.type == "cpu" and (share_a * share_b).all():  # one pass; it cannot hide what an empty side holds
        out = torch.lerp(out_a.to(lse.dtype), out_b.to(lse.dtype), per_query(share_b))
    else:
        out = weighed(out_a, share_a).add_(weighed(out_b, share_b))
    return out.to(out_a.dtype).contiguous(), lse.contiguous()


def merge_attention_backward(
    grad_out: Tensor, grad_lse: Tensor, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of out_a, lse_a, out_b, lse_b. With shares a and b = 1 - a: d a / d lse_a = a b = -d a / d lse_b."""
    share_a, share_b, lse = merge_weights(lse_a, lse_b)
    both = share_a * share_b
    apart = (grad_out * (out_a.to(lse.dtype) - out_b)).sum(-1).transpose(1, 2)  # [B, H, Lq]
    moved = (apart * both).masked_fill(both == 0, 0.0)
    grad_a = weighed(grad_out, share_a).to(out_a.dtype)
    grad_b = weighed(grad_out, share_b).to(out_b.dtype)
    grads = (grad_a, grad_lse * share_a + moved, grad_b, grad_lse * share_b - moved)
    return tuple(grad.contiguous() for grad in grads)
