"""The formulas of the feature methods, entry by entry in loops: slow, and hard to get wrong.

Features are `(B, C, *S)`; `state` is a method's state dict, of which `key` is the pair's prefix.
"""

import math
from itertools import product

import torch


def positions(feature):
    """Indices of all positions: one empty index for vectors."""
    return list(product(*map(range, feature.shape[2:])))


def at(feature, b, place):
    """The channels `(C,)` at one position of one sample."""
    return feature[(b, slice(None), *place)]


def from_columns(columns, size):
    """`(B, C, *S)` of a function of sample and position that gives `(C,)`."""
    batch, *space = size
    rows = []
    for b in range(batch):
        column = torch.stack([columns(b, place) for place in product(*map(range, space))], dim=1)
        rows.append(column.reshape(-1, *space))
    return torch.stack(rows)


def resize(feature, size):
    """Mean over cells from floor(i n / m) to ceil((i + 1) n / m)."""
    lengths = feature.shape[2:]

    def column(b, place):
        cell = [range(i * n // m, -(-(i + 1) * n // m)) for i, n, m in zip(place, lengths, size, strict=True)]
        members = [at(feature, b, member) for member in product(*cell)]
        return sum(members) / len(members)

    return from_columns(column, (len(feature), *size))


def common(student, teacher):
    size = [min(pair) for pair in zip(student.shape[2:], teacher.shape[2:], strict=True)]
    return resize(student, size), resize(teacher, size)


def conv(state, key, feature, padding=0):
    """A convolution whose kernel is 2 padding + 1 wide, or a linear layer."""
    weight, size = state[f"{key}.weight"], feature.shape[2:]
    bias = state.get(f"{key}.bias", weight.new_zeros(len(weight)))

    def column(b, place):
        out = bias.clone()
        for offset in product(range(-padding, padding + 1), repeat=len(size)):
            where = [p + o for p, o in zip(place, offset, strict=True)]
            if all(0 <= w < n for w, n in zip(where, size, strict=True)):
                kernel = weight[(slice(None), slice(None), *[o + padding for o in offset])]
                out = out + kernel @ at(feature, b, where)
        return out

    return from_columns(column, (len(feature), *size))


def batch_norm(state, key, feature):
    """By the batch's own mean and variance."""
    channels = []
    for c in range(feature.shape[1]):
        values = feature[:, c]
        spread = ((values - values.mean()) ** 2).mean()
        scaled = (values - values.mean()) / (spread + 1e-5).sqrt()
        channels.append(scaled * state[f"{key}.weight"][c] + state[f"{key}.bias"][c])
    return torch.stack(channels, dim=1)


def relu(x):
    return x * (x > 0)


def mean_square(a, b):
    terms = [(x - y) ** 2 for x, y in zip(a.reshape(-1), b.reshape(-1), strict=True)]
    return sum(terms) / len(terms)


def pooled(feature):
    """`(B, C)`, as a list of vectors."""
    places = positions(feature)
    return [sum(at(feature, b, place) for place in places) / len(places) for b in range(len(feature))]


def length(vector):
    return sum(x * x for x in vector) ** 0.5


def fitnet(state, key, student, teacher):
    student, teacher = common(student, teacher)
    return mean_square(conv(state, f"regressors.{key}", student), teacher)


def attention(student, teacher, power):
    maps = []
    for feature in common(student, teacher):
        rows = []
        for b in range(len(feature)):
            row = [sum(abs(x) ** power for x in at(feature, b, p)) for p in positions(feature)]
            rows.append(torch.stack([x / length(row) for x in row]))
        maps.append(torch.stack(rows))
    return mean_square(*maps)


def sp(student, teacher):
    matrices = []
    for feature in (student, teacher):
        rows = []
        for one in feature:
            row = [(one * other).sum() for other in feature]
            rows.append(torch.stack([x / length(row) for x in row]))
        matrices.append(torch.stack(rows))
    return ((matrices[0] - matrices[1]) ** 2).sum() / len(student) ** 2


def huber(difference):
    size = abs(difference)
    return size**2 / 2 if size < 1 else size - 0.5


def rkd_distance(student, teacher):
    scaled = []
    for feature in (student, teacher):
        vectors, found = pooled(feature), {}
        for i, j in product(range(len(vectors)), repeat=2):
            if i != j:
                found[i, j] = length(vectors[i] - vectors[j])
        mean = sum(found.values()) / len(found)
        scaled.append({pair: distance / mean for pair, distance in found.items()})
    return sum(huber(scaled[0][pair] - scaled[1][pair]) for pair in scaled[0]) / len(student) ** 2


def rkd_angle(student, teacher):
    ours, theirs = pooled(student), pooled(teacher)
    total = 0.0
    for j, i, k in product(range(len(ours)), repeat=3):
        if j not in (i, k):
            cosines = []
            for f in (ours, theirs):
                one, two = f[i] - f[j], f[k] - f[j]
                cosines.append((one * two).sum() / (length(one) * length(two)))
            total = total + huber(cosines[0] - cosines[1])
    return total / len(ours) ** 3


def pkt(student, teacher, eps=1e-7):
    ours, theirs = pooled(student), pooled(teacher)

    def probability(f, i, j):
        kernel = [((f[i] * other).sum() / (length(f[i]) * length(other)) + 1) / 2 for other in f]
        return kernel[j] / sum(kernel)

    total = 0.0
    for i, j in product(range(len(ours)), repeat=2):
        p, q = probability(theirs, i, j), probability(ours, i, j)
        total = total + p * torch.log((p + eps) / (q + eps))
    return total / len(ours) ** 2


def vid(state, key, student, teacher):
    student, teacher = common(student, teacher)
    hidden = relu(conv(state, f"gaussians.{key}.mean.0", student))
    hidden = relu(conv(state, f"gaussians.{key}.mean.2", hidden))
    mean = conv(state, f"gaussians.{key}.mean.4", hidden)
    terms = []
    for c, raw in enumerate(state[f"gaussians.{key}.raw_variance"]):
        variance = torch.log(1 + torch.exp(raw)) + 1e-5
        for x, y in zip(mean[:, c].reshape(-1), teacher[:, c].reshape(-1), strict=True):
            terms.append(((x - y) ** 2 / variance + torch.log(variance)) / 2)
    return sum(terms) / len(terms)


def mgd(state, key, student, teacher, kept):
    """`kept` `(B, 1, *S)`: True where the student's feature is not left out."""
    student, teacher = common(student, teacher)
    if f"align.{key}.weight" in state:
        student = conv(state, f"align.{key}", student)
    masked = from_columns(
        lambda b, place: at(student, b, place) * float(at(kept, b, place)), (len(student), *student.shape[2:])
    )
    hidden = relu(conv(state, f"generation.{key}.0", masked, padding=1))
    return mean_square(conv(state, f"generation.{key}.2", hidden, padding=1), teacher)


def negative_means(teachers):
    """Per channel, of the features of all batches so far."""
    means = []
    for c in range(teachers[0].shape[1]):
        below = [x for teacher in teachers for x in teacher[:, c].reshape(-1) if x < 0]
        means.append(sum(below) / len(below) if below else torch.zeros((), dtype=torch.float64))
    return means


def ofd(state, key, student, teacher, margins, later):
    """`later`: number of stages behind this one."""
    student, teacher = common(student, teacher)
    layers = f"connectors.{key}.layers"
    ours = batch_norm(state, f"{layers}.1", conv(state, f"{layers}.0", student))
    total = 0.0
    for b, c in product(range(len(ours)), range(ours.shape[1])):
        for place in positions(ours):
            s, t = ours[(b, c, *place)], max(teacher[(b, c, *place)], margins[c])
            if s > t or t > 0:
                total = total + (s - t) ** 2
    return total / len(ours) / 1000 / 2**later


class CRD:
    """Both memories of a pair, and their contrast."""

    def __init__(self, state, key, temperature, momentum):
        self.state = {name.removeprefix(f"contrasts.{key}."): value for name, value in state.items()}
        self.memory = {side: self.state[f"{side}.vectors"].clone() for side in ("student", "teacher")}
        self.z, self.temperature, self.momentum = {}, temperature, momentum

    def embed(self, side, feature):
        weight, bias = self.state[f"embed_{side}.weight"], self.state[f"embed_{side}.bias"]
        vectors = [weight @ vector + bias for vector in pooled(feature)]
        return [vector / length(vector) for vector in vectors]

    def side(self, vectors, side, indices, drawn):
        memory = self.memory[side].clone()
        chosen = [[i, *others] for i, others in zip(indices.tolist(), drawn.tolist(), strict=True)]
        scores = [
            [torch.exp((vector * memory[i]).sum() / self.temperature) for i in row]
            for vector, row in zip(vectors, chosen, strict=True)
        ]
        flat = [x.detach() for row in scores for x in row]
        z = self.z.setdefault(side, sum(flat) / len(flat) * len(memory))
        noise = drawn.shape[1] / len(memory)
        total = 0.0
        for row in scores:
            for place, score in enumerate(row):
                h = score / z / (score / z + noise)
                total = total - torch.log(h if place == 0 else 1 - h)
        return total / len(scores)

    def step(self, student, teacher, indices, drawn):
        ours, theirs = self.embed("student", student), self.embed("teacher", teacher)
        loss = self.side(ours, "teacher", indices, drawn) + self.side(theirs, "student", indices, drawn)
        for side, vectors in (("student", ours), ("teacher", theirs)):
            for i, vector in zip(indices.tolist(), vectors, strict=True):
                moved = self.momentum * self.memory[side][i] + (1 - self.momentum) * vector.detach()
                self.memory[side][i] = moved / length(moved)
        return loss


def hierarchical(student, teacher):
    side = min(student.shape[2:])
    losses, weights, weight = [mean_square(student, teacher)], [1.0], 1.0
    for level in (4, 2, 1):
        if level < side:
            weight /= 2
            losses.append(mean_square(resize(student, (level, level)), resize(teacher, (level, level))))
            weights.append(weight)
    return sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)


def nearest(feature, size):
    def column(b, place):
        where = [math.floor(p * n / m) for p, n, m in zip(place, feature.shape[2:], size, strict=True)]
        return at(feature, b, where)

    return from_columns(column, (len(feature), *size))


def reviewkd(state, keys, students, teachers):
    """One loss per stage, first stage first."""
    losses, fused = [], None
    for key, student, teacher in reversed(list(zip(keys, students, teachers, strict=True))):
        layer = f"fusions.{key}"
        narrow = batch_norm(state, f"{layer}.narrow.1", conv(state, f"{layer}.narrow.0", student))
        if fused is not None:
            deeper = nearest(fused, narrow.shape[2:])
            shares = conv(state, f"{layer}.attention.0", torch.cat([narrow, deeper], 1))
            shares = 1 / (1 + torch.exp(-shares))
            narrow = from_columns(
                lambda b, p, n=narrow, d=deeper, s=shares: (
                    at(n, b, p) * at(s, b, p)[0] + at(d, b, p) * at(s, b, p)[1]
                ),
                (len(narrow), *narrow.shape[2:]),
            )
        fused = narrow
        wide = batch_norm(state, f"{layer}.widen.1", conv(state, f"{layer}.widen.0", fused, padding=1))
        losses.insert(0, hierarchical(*common(wide, teacher)))
    return losses
