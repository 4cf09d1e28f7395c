"""The ops as float64 loops over single vectors: what the tests compare with. Shares no code with the package."""

import math

import numpy as np


def array(x):
    return x.detach().cpu().double().numpy()


def frame_means(key, tokens_per_frame):
    key = array(key)
    batch, tokens, heads, head_dim = key.shape
    out = np.zeros((batch, tokens // tokens_per_frame, heads, head_dim))
    for token in range(tokens):
        out[:, token // tokens_per_frame] += key[:, token] / tokens_per_frame
    return out


def counted(mask, row, tokens):
    return [t for t in range(tokens) if mask is None or bool(mask[row, t])]


def relevance_mean(text_key, key, tokens_per_frame, scale, mask=None):
    """Mean over heads, text tokens and frame tokens of every single product."""
    text, key = array(text_key), array(key)
    batch, tokens, heads, _ = text.shape
    frames = key.shape[1] // tokens_per_frame
    out = np.zeros((batch, frames))
    for b in range(batch):
        rows = counted(mask, b, tokens)
        for f in range(frames):
            products = [
                text[b, t, h] @ key[b, f * tokens_per_frame + i, h] * scale
                for t in rows
                for h in range(heads)
                for i in range(tokens_per_frame)
            ]
            out[b, f] = sum(products) / len(products) if products else 0.0
    return out


def relevance_token(text_key, frame_mean, scale, mask=None):
    """[B, T, F]: mean over heads of single products; 0 for a token that does not count."""
    text, means = array(text_key), array(frame_mean)
    batch, tokens, heads, _ = text.shape
    out = np.zeros((batch, tokens, means.shape[1]))
    for b in range(batch):
        for t in counted(mask, b, tokens):
            for f in range(means.shape[1]):
                out[b, t, f] = sum(text[b, t, h] @ means[b, f, h] for h in range(heads)) * scale / heads
    return out


def relevance_softmax(text_key, key, tokens_per_frame, scale, mask=None):
    """Every text token of every head attends to all keys; how much of it falls on each frame, on average."""
    text, key = array(text_key), array(key)
    batch, tokens, heads, _ = text.shape
    frames = key.shape[1] // tokens_per_frame
    out = np.zeros((batch, frames))
    for b in range(batch):
        rows = counted(mask, b, tokens)
        for t in rows:
            for h in range(heads):
                logits = [text[b, t, h] @ key[b, j, h] * scale for j in range(key.shape[1])]
                top = max(logits)
                masses = [math.exp(logit - top) for logit in logits]
                for j, mass in enumerate(masses):
                    out[b, j // tokens_per_frame] += mass / sum(masses) / len(rows) / heads
    return out


def scores(query, frame_mean):
    """[B, H, F]: <mean query, frame mean>."""
    query, frame_mean = array(query), array(frame_mean)
    batch, tokens, heads, _ = query.shape
    out = np.zeros((batch, heads, frame_mean.shape[1]))
    for b in range(batch):
        for h in range(heads):
            mean = sum(query[b, i, h] for i in range(tokens)) / tokens
            for f in range(frame_mean.shape[1]):
                out[b, h, f] = mean @ frame_mean[b, f, h]
    return out


def best_frames(score, top_k, valid=None):
    """score [B, H, F] -> nested lists of the chosen frames, ascending, ties to the lower index, padded with -1."""
    chosen = []
    for b, row in enumerate(score):
        chosen.append([])
        for head in row:
            usable = [f for f in range(len(head)) if valid is None or bool(valid[b, f])]
            best = sorted(usable, key=lambda f: (-head[f], f))[:top_k]
            chosen[b].append(sorted(best) + [-1] * (min(top_k, len(head)) - len(best)))
    return chosen


def raised(scores, weights, prior, chosen):
    """One row: what every frame adds to the chosen ones, a list; -inf for one that may not be chosen (any more)."""
    scores, weights, prior = array(scores), array(weights), array(prior)
    usable = [f for f in range(len(prior)) if prior[f] > -math.inf]
    out = [-math.inf] * len(prior)
    for f in usable:
        if f in chosen:
            continue
        out[f] = prior[f]
        for t in range(len(weights)):
            if not weights[t] > 0:
                continue
            known = [s for s in (scores[t, e] for e in usable) if s > -math.inf]  # NaN is not
            reached = max([min(known, default=math.inf), *(scores[t, e] for e in chosen if scores[t, e] > -math.inf)])
            if scores[t, f] > reached:
                out[f] += weights[t] * (scores[t, f] - reached)
    return out


def covering(scores, weights, k, prior):
    """[R][places]: greedily, every time the first of those that add most."""
    table = []
    for row in range(len(scores)):
        chosen = []
        for _ in range(min(k, scores.shape[2])):
            worth = raised(scores[row], weights[row], prior[row], chosen)
            best = max(range(len(worth)), key=lambda f: (worth[f], -f))
            chosen.append(best if worth[best] > -math.inf else -1)
        table.append(chosen)
    return table


def attention(query, key, value, tokens_per_frame, scale, table=None, candidate_frames=0):
    """out and lse of softmax attention over the frames of `table` (repeats repeat, -1 = none) and all later frames."""
    query, key, value = array(query), array(key), array(value)
    batch, queries, heads, _ = query.shape
    frames = key.shape[1] // tokens_per_frame
    out = np.zeros_like(query)
    lse = np.full((batch, heads, queries), -np.inf)
    for b in range(batch):
        for h in range(heads):
            named = range(candidate_frames) if table is None else [int(f) for f in table[b][h] if f >= 0]
            visible = [*named, *range(candidate_frames, frames)]
            places = [f * tokens_per_frame + i for f in visible for i in range(tokens_per_frame)]
            for i in range(queries if places else 0):
                logits = [query[b, i, h] @ key[b, j, h] * scale for j in places]
                top = max(logits)
                total = sum(math.exp(logit - top) for logit in logits)
                lse[b, h, i] = top + math.log(total)
                for logit, j in zip(logits, places, strict=True):
                    out[b, i, h] += math.exp(logit - top) / total * value[b, j, h]
    return out, lse


def norm_rope(x, weight, eps, grid, start_frame):
    """RMS norm over all heads of a token together, then every channel pair turned by its angle."""
    x, weight = array(x), array(weight)
    batch, tokens, heads, head_dim = x.shape
    rows, cols = grid
    pairs = head_dim // 2
    third = pairs // 3
    out = np.zeros_like(x)
    for b in range(batch):
        for token in range(tokens):
            frame, place = divmod(token, rows * cols)
            row, col = divmod(place, cols)
            whole = x[b, token].reshape(-1)
            normed = whole / math.sqrt(sum(c * c for c in whole) / len(whole) + eps) * weight
            for h in range(heads):
                for pair in range(pairs):
                    if pair < pairs - 2 * third:
                        position, index, count = start_frame + frame, pair, pairs - 2 * third
                    elif pair < pairs - third:
                        position, index, count = row, pair - (pairs - 2 * third), third
                    else:
                        position, index, count = col, pair - (pairs - third), third
                    angle = position * 10000.0 ** (-index / count)
                    a, c = normed[h * head_dim + 2 * pair], normed[h * head_dim + 2 * pair + 1]
                    out[b, token, h, 2 * pair] = a * math.cos(angle) - c * math.sin(angle)
                    out[b, token, h, 2 * pair + 1] = a * math.sin(angle) + c * math.cos(angle)
    return out
