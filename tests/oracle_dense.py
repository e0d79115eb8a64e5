"""The formulas of the methods for dense models, position by position in loops: slow, and hard to get wrong.

Features are `(B, C, H, W)`, already of one size; `valid` is `(B, H, W)` bool; label maps hold 255 where void.
"""

from itertools import product

import torch


def places(valid, b):
    """The valid positions of one picture."""
    height, width = valid.shape[1:]
    return [p for p in product(range(height), range(width)) if valid[(b, *p)]]


def at(feature, b, place):
    return feature[(b, slice(None), *place)]


def cosine(a, b):
    return (a @ b) / (a.norm() * b.norm())


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def linear(state, key, feature):
    """A 1x1 convolution."""
    weight, bias = state[f"{key}.weight"].flatten(1), state[f"{key}.bias"]
    return torch.einsum("oc,bchw->bohw", weight, feature) + bias.view(1, -1, 1, 1)


def cwd(student, teacher, valid, temperature):
    def kl(b, c):
        ours, theirs = (
            torch.stack([x[(b, c, *p)] / temperature for p in places(valid, b)]).exp()
            for x in (student, teacher)
        )
        ours, theirs = ours / ours.sum(), theirs / theirs.sum()
        return sum(t * (t / s).log() for s, t in zip(ours, theirs, strict=True))

    batch, channels = student.shape[:2]
    return temperature**2 * sum(kl(b, c) for b in range(batch) for c in range(channels)) / batch / channels


def pkd(student, teacher, valid):
    total, count = 0, 0
    for c in range(student.shape[1]):
        sides = []
        for x in (student, teacher):
            values = torch.stack([x[(b, c, *p)] for b in range(len(x)) for p in places(valid, b)])
            sides.append((values - values.mean()) / (values.std() + 1e-6))
        total = total + (sides[0] - sides[1]).square().sum() / 2
        count += len(sides[0])
    return total / count


def prototype(feature, labels, b, k, valid):
    members = [at(feature, b, p) for p in places(valid, b) if labels[(b, *p)] == k]
    return sum(members) / len(members) if members else None


def ifvd(student, teacher, labels, valid):
    errors = []
    for b in range(len(student)):
        for p in places(valid & (labels != 255), b):
            own = int(labels[(b, *p)])
            ours, theirs = (
                cosine(at(x, b, p), prototype(x, labels, b, own, valid)) for x in (student, teacher)
            )
            errors.append((ours - theirs) ** 2)
    return mean(errors)


def skd(student, teacher, valid, grid):
    def nodes(x, b):
        used = places(valid, b)
        rows, columns = sorted({r for r, _ in used}), sorted({c for _, c in used})
        high, wide = (side[-1] - side[0] + 1 for side in (rows, columns))
        cells = {}
        for r, c in used:
            cell = (r - rows[0]) * grid // high, (c - columns[0]) * grid // wide
            cells.setdefault(cell, []).append(at(x, b, (r, c)))
        return {cell: sum(members) / len(members) for cell, members in cells.items()}

    errors = []
    for b in range(len(student)):
        ours, theirs = nodes(student, b), nodes(teacher, b)
        errors += [(cosine(ours[i], ours[j]) - cosine(theirs[i], theirs[j])) ** 2 for i in ours for j in ours]
    return mean(errors)
