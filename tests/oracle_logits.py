"""The methods on class scores once more, from the papers' formulas, with loops over samples and classes.

Everything is a Python list of 0-dimensional tensors, so that gradients can be compared too.
"""

import itertools
import math
import statistics

import torch

BN_EPS = 1e-5


def rows(tensor):
    """`(B, K, *S)` as one list of K scalars per sample and position."""
    places = itertools.product(range(len(tensor)), *map(range, tensor.shape[2:]))
    return [[tensor[(b, k, *where)] for k in range(tensor.shape[1])] for b, *where in places]


def mean(values):
    return sum(values) / len(values)


def softmax(scores, tau=1.0):
    powers = [(score / tau).exp() for score in scores]
    return [power / sum(powers) for power in powers]


def kl(p, q):
    """KL(p || q)."""
    return sum(a * (a / b).log() for a, b in zip(p, q, strict=True))


def z_score(scores):
    centre = mean(scores)
    deviation = (sum((s - centre) ** 2 for s in scores) / (len(scores) - 1)).sqrt()
    return [(s - centre) / (1e-7 + deviation) for s in scores]


def kd(student, teacher, tau, standardize=False):
    found = []
    for s, t in zip(rows(student), rows(teacher), strict=True):
        s, t = (z_score(s), z_score(t)) if standardize else (s, t)
        found.append(tau**2 * kl(softmax(t, tau), softmax(s, tau)))
    return mean(found)


def dkd(student, teacher, labels, alpha, beta, tau, standardize=False):
    """Labels: one per sample and position, in order; those that are no class are skipped."""
    target, non_target = [], []
    for s, t, label in zip(rows(student), rows(teacher), labels, strict=True):
        if not 0 <= label < len(s):
            continue
        s, t = (z_score(s), z_score(t)) if standardize else (s, t)
        (binary_s, rest_s), (binary_t, rest_t) = (_decoupled(softmax(z, tau), label) for z in (s, t))
        target.append(alpha * tau**2 * kl(binary_t, binary_s))
        non_target.append(beta * tau**2 * kl(rest_t, rest_s))
    return mean(target), mean(non_target)


def _decoupled(probs, label):
    others = [p for k, p in enumerate(probs) if k != label]
    return [probs[label], sum(others)], [p / sum(others) for p in others]


def dist(student, teacher, beta, gamma, tau):
    ours, theirs = ([softmax(row, tau) for row in rows(z)] for z in (student, teacher))
    inter = 1 - mean([pearson(a, b) for a, b in zip(ours, theirs, strict=True)])
    columns = zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True)
    intra = 1 - mean([pearson(a, b) for a, b in columns])
    return beta * tau**2 * inter, gamma * tau**2 * intra


def pearson(a, b):
    a, b = [x - mean(a) for x in a], [x - mean(b) for x in b]
    lengths = sum(x * x for x in a).sqrt() * sum(x * x for x in b).sqrt()
    return sum(x * y for x, y in zip(a, b, strict=True)) / (lengths + 1e-8)


def mlkd(student, teacher, temperatures, standardize=False):
    certain = [softmax(row) for row in rows(teacher)]
    samples = share_up_to_median([max(p).item() for p in certain])
    classes = share_up_to_median([sum(p).item() for p in zip(*certain, strict=True)])
    instance = batch = between_classes = 0
    for tau in temperatures:
        a, b = ([softmax(row, tau) for row in rows(z)] for z in (student, teacher))
        instance += kd(student, teacher, tau, standardize)
        batch += gram_difference(a, b) / len(a)
        between_classes += gram_difference(list(zip(*a, strict=True)), list(zip(*b, strict=True))) / len(a[0])
    return samples * instance, samples * batch, classes * between_classes


def gram_difference(a, b):
    found = 0
    for i, j in itertools.product(range(len(a)), repeat=2):
        ours = sum(x * y for x, y in zip(a[i], a[j], strict=True))
        theirs = sum(x * y for x, y in zip(b[i], b[j], strict=True))
        found += (theirs - ours) ** 2
    return found


def share_up_to_median(values):
    median = statistics.median(values)
    return mean([float(value <= median) for value in values])


def ofa(student, teacher, labels, eps, tau=1.0):
    found = []
    for s, t, label in zip(rows(student), rows(teacher), labels, strict=True):
        if not 0 <= label < len(s):
            continue
        p, q = softmax(t, tau), softmax(s, tau)
        weights = [(x + 1) ** eps - 1 if k == label else x**eps for k, x in enumerate(p)]
        found.append(-sum(w * x.log() for w, x in zip(weights, q, strict=True)))
    return mean(found)


def linear(weight, x):
    """`(O, I)` on `(B, I, L)`."""
    return torch.stack([sum(weight[:, i, None] * row[i] for i in range(len(row))) for row in x])


def depthwise(weight, x):
    """A kernel of 3 per channel, `(C, 1, 3)`, on `(B, C, L)` with zeros around."""
    found = torch.zeros_like(x)
    for b, c, place, k in itertools.product(*map(range, x.shape), range(3)):
        source = place + k - 1
        if 0 <= source < x.shape[2]:
            found[b, c, place] += weight[c, 0, k] * x[b, c, source]
    return found


def full_convolution(weight, x):
    """`(O, I, 3)` on `(B, I, L)` with zeros around."""
    channels = [
        sum(depthwise(weight[o : o + 1, i : i + 1], x[:, i : i + 1]) for i in range(x.shape[1]))
        for o in range(len(weight))
    ]
    return torch.cat(channels, 1)


def batch_norm(x):
    """Fresh BatchNorm in training of `(B, C, L)`."""
    count = len(x) * x.shape[2]
    found = []
    for c in range(x.shape[1]):
        values = x[:, c]
        centre = values.sum() / count
        variance = ((values - centre) ** 2).sum() / count
        found.append((values - centre) / math.sqrt(variance.item() + BN_EPS))
    return torch.stack(found, 1)


def relu(x):
    return x * (x > 0)
