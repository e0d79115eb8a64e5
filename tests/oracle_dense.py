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


def softened(position, candidates, temperature):
    scores = torch.stack([cosine(position, c) / temperature for c in candidates]).exp()
    return scores / scores.sum()


def kl(p, q):
    return sum(a * (a / b).log() for a, b in zip(p, q, strict=True))


def cirkd_pixel(student, teacher, valid, temperature):
    found = []
    for i in range(len(student)):
        for p in places(valid, i):
            for j in range(len(student)):
                ours, theirs = (
                    softened(at(x, i, p), [at(x, j, q) for q in places(valid, j)], temperature)
                    for x in (student, teacher)
                )
                found.append(kl(theirs, ours))
    return mean(found)


def regions(teacher, labels, valid, classes):
    """By class, the mean of its positions in each picture that has it."""
    found = {
        k: [prototype(teacher, labels, b, k, valid) for b in range(len(teacher))] for k in range(classes)
    }
    return {k: [r for r in rows if r is not None] for k, rows in found.items()}


def cirkd_region(aligned, teacher, labels, valid, candidates, temperature):
    found = []
    for b in range(len(aligned)):
        for p in places(valid & (labels != 255), b):
            ours, theirs = (softened(at(x, b, p), candidates, temperature) for x in (aligned, teacher))
            found.append(kl(theirs, ours))
    return mean(found)


def pool(feature, valid, factor):
    """Means over the valid positions of cells, and which cells are at least half valid."""
    batch, channels, height, width = feature.shape
    rows, where = [], torch.zeros(batch, height // factor, width // factor, dtype=torch.bool)
    for b, r, c in product(range(batch), range(height // factor), range(width // factor)):
        cell = [(r * factor + i, c * factor + j) for i in range(factor) for j in range(factor)]
        members = [at(feature, b, p) for p in cell if valid[(b, *p)]]
        where[b, r, c] = 2 * len(members) >= len(cell)
        rows.append(sum(members) / len(members) if members else torch.zeros(channels, dtype=feature.dtype))
    stacked = torch.stack(rows).view(batch, height // factor, width // factor, channels)
    return stacked.permute(0, 3, 1, 2), where


def softmax_over(values):
    return torch.stack(list(values)).softmax(0)


def fgd(state, student, teacher, boxes, valid, temperature):
    """Foreground, background, attention, relation, without their weights; boxes in positions of the map."""
    totals = dict.fromkeys(("foreground", "background", "attention", "relation"), 0)
    channels = student.shape[1]
    for b in range(len(student)):
        used = places(valid, b)
        share = {}
        for x1, y1, x2, y2 in boxes[b].tolist():
            left, top, right, bottom = int(x1 // 1), int(y1 // 1), int(-(-x2 // 1)), int(-(-y2 // 1))
            area = (right - left + 1) * (bottom - top + 1)
            for p in used:
                if top <= p[0] <= bottom and left <= p[1] <= right:
                    share[p] = max(share.get(p, 0), 1 / area)
        outside = [p for p in used if p not in share]
        space, weight, context = [], [], []
        for side, x in enumerate((student, teacher)):
            strengths = softmax_over(at(x, b, p).abs().mean() / temperature for p in used) * len(used)
            space.append(dict(zip(used, strengths, strict=True)))
            weight.append(
                softmax_over(mean(x[(b, c, *p)].abs() for p in used) / temperature for c in range(channels))
                * channels
            )
            context.append(_context(state, f"contexts.map.{side}", x, b, used))
        for p in used:
            error = (at(teacher, b, p) - at(student, b, p)).square() * space[1][p] * weight[1]
            totals["foreground"] += share.get(p, 0) * error.sum()
            totals["background"] += (p in outside) * error.sum() / max(1, len(outside))
            totals["attention"] += (space[0][p] - space[1][p]).abs()
            relation = at(teacher, b, p) + context[1] - at(student, b, p) - context[0]
            totals["relation"] += relation.square().sum()
        totals["attention"] += (weight[0] - weight[1]).abs().sum()
    return {name: total / len(student) for name, total in totals.items()}


def _context(state, key, x, b, used):
    """What all positions say together, through two linear layers."""
    mask = state[f"{key}.mask.weight"].flatten()
    share = softmax_over(mask @ at(x, b, p) + state[f"{key}.mask.bias"][0] for p in used)
    together = sum(s * at(x, b, p) for s, p in zip(share, used, strict=True))
    hidden = state[f"{key}.add.0.weight"] @ together + state[f"{key}.add.0.bias"]
    hidden = (hidden - hidden.mean()) / (hidden.var(unbiased=False) + 1e-5).sqrt()
    hidden = (hidden * state[f"{key}.add.1.weight"] + state[f"{key}.add.1.bias"]).clamp(min=0)
    return state[f"{key}.add.3.weight"] @ hidden + state[f"{key}.add.3.bias"]


def contrast(ours, theirs, temperature):
    """Each vector of a list against all of the other: mean of -log of its own share."""
    return [-softened(v, theirs, temperature)[i].log() for i, v in enumerate(ours)]


def afdcd(rebuilt, teacher, valid, patch, groups, temperature):
    """The contrasts of positions and of groups of channels, in patches."""
    spatial, channel = [], []
    for b, top, left in product(
        range(len(valid)), range(0, valid.shape[1], patch), range(0, valid.shape[2], patch)
    ):
        used = [
            p for p in places(valid, b) if p[0] // patch == top // patch and p[1] // patch == left // patch
        ]
        if not used:
            continue
        ours, theirs = ([at(x, b, p) for p in used] for x in (rebuilt, teacher))
        spatial += contrast(ours, theirs, temperature)
        ours, theirs = (torch.stack(x, 1).reshape(groups, -1) for x in (ours, theirs))
        channel += contrast(list(ours), list(theirs), temperature)
    return mean(spatial), mean(channel)


def ld(student, teacher, valid, bins, temperature):
    found = []
    for b in range(len(student)):
        for p in places(valid, b):
            for side in range(4):
                part = slice(side * bins, (side + 1) * bins)
                ours, theirs = ((at(x, b, p)[part] / temperature).softmax(0) for x in (student, teacher))
                found.append(temperature**2 * kl(theirs, ours))
    return mean(found)


def giou(a, b):
    """Of two boxes, left, top, right, bottom."""
    area = lambda box: (box[2] - box[0]) * (box[3] - box[1])  # noqa: E731
    across, down = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    both = across * down if across > 0 and down > 0 else 0 * across
    whole = area(a) + area(b) - both
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return both / (whole + 1e-7) - (hull - whole) / (hull + 1e-7)


def box_of(row, kind):
    """Of a head's four numbers, around an anchor of side 1 whose centre is 0."""
    if kind == "fcos":
        left, top, right, bottom = row.relu()
        return -left, -top, right, bottom
    x, y, w, h = row[0], row[1], *row[2:].clamp(max=4.135).exp()
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2


def crosskd(kind, student, teacher, adapters, ours, theirs, valid, beta):
    """Anchor by anchor; all but the last convolution is the student's, the last one the teacher's."""
    cut = 3  # layers of both: one convolution of two, its norm and ReLU (FCOS); three blocks of four
    heads = {"classes": ("classification_head", "cls_logits"), "boxes": ("regression_head", "bbox_reg")}
    total, objects = {"classes": 0, "boxes": 0}, 0
    for name, feature in ours.items():
        size = feature.shape[2:]
        step = valid.shape[1] // size[0]
        inside = valid[:, ::step, ::step]
        found, goal = {}, {}
        for what, (tower, layer) in heads.items():
            s, t = getattr(student.head, tower), getattr(teacher.head, tower)
            crossed = adapters[what](s.conv[:cut](feature * inside[:, None]))
            found[what] = getattr(t, layer)(t.conv[cut:](crossed))
            goal[what] = getattr(t, layer)(t.conv(theirs[name] * inside[:, None])).detach()
        for b in range(len(feature)):
            for place in places(inside, b):
                for anchor in range(2):
                    p, q = (at(x["classes"], b, place).chunk(2)[anchor].sigmoid() for x in (found, goal))
                    entropy = -(q * p.log() + (1 - q) * (1 - p).log())
                    total["classes"] += ((p - q).abs() ** beta * entropy).sum()
                    c, d = (box_of(at(x["boxes"], b, place).chunk(2)[anchor], kind) for x in (found, goal))
                    solid = d[0] < d[2] and d[1] < d[3]
                    total["boxes"] += q.max() * (1 - giou(c, d)) if solid else 0
                    objects += q.max()
    return {what: value / max(objects, 1) for what, value in total.items()}
