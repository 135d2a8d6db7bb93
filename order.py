"""Which photos come when: an epoch's order, with rare classes' photos repeated and similar shapes put together.

Read `BatchOrder`; a data set brings what the other two need: `sizes`, `labels` and `offsets` (data.py).
"""
import random

import numpy as np


def repeat_factors(dataset, threshold):
    """How often a photo comes in an epoch, on average [N] (LVIS, Gupta 2019, appendix B): the largest of
    max(1, sqrt(threshold / f)) over the classes in it, where f is the share of photos that have the class."""
    owner = np.repeat(np.arange(len(dataset)), np.diff(dataset.offsets))
    photo, label = np.unique(np.stack([owner, dataset.labels]), axis=1)
    share, factors = np.bincount(label) / len(dataset), np.ones(len(dataset))
    np.maximum.at(factors, photo, np.sqrt(threshold / share[label]))
    return factors


def repeated(factors, start):
    """Indices of an epoch's photos: photo i comes factors[i] times, up or down to a whole number by the start in [0, 1).

    The factors are lengths along a ruler; evenly spaced marks on it, the first at the start, pick the photos, so that
    every epoch has as many.
    """
    ends = np.cumsum(factors)
    count = round(float(ends[-1]))
    return np.searchsorted(ends, (np.arange(count) + start) * ends[-1] / count, side="right").tolist()


class BatchOrder:
    """The order of one training epoch, a batch_sampler for DataLoader: yields lists of (index, sample seed).

    A fresh permutation from (seed, epoch). A last, smaller batch is left out, but fewer photos than batch_size are
    repeated to fill one. A sample's seed depends on (seed, epoch, place in the order) alone: a run that resumes after
    `start` batches sees what it would have seen.

    factors: [n] of `repeat_factors`, or None. buckets: so many batches' photos at a time are sorted by their shapes
    [n] (width / height) before they are cut into batches, and the batches shuffled.
    """

    def __init__(self, n, batch_size, seed, epoch, start=0, factors=None, shapes=None, buckets=0):
        self.batch_size, self.seed, self.epoch, self.start = batch_size, seed, epoch, start
        self.factors, self.shapes, self.window = factors, shapes, buckets * batch_size
        self.photos = n
        self.n = n if factors is None else round(float(factors.sum()))

    def __len__(self):
        return max(0, max(1, self.n // self.batch_size) - self.start)

    def __iter__(self):
        rng = random.Random(f"order {self.seed} {self.epoch}")
        order = list(range(self.photos)) if self.factors is None else repeated(self.factors, rng.random())
        rng.shuffle(order)
        for begin in range(0, self.n, self.window) if self.window else ():
            alike = sorted(order[begin:begin + self.window], key=self.shapes.__getitem__)
            batches = [alike[i:i + self.batch_size] for i in range(0, len(alike), self.batch_size)]
            rest = batches.pop() if len(batches[-1]) < self.batch_size else []        # stays last, and is left out
            rng.shuffle(batches)
            order[begin:begin + self.window] = sum(batches, []) + rest
        for batch in range(self.start, self.start + len(self)):
            yield [(order[place % self.n], random.Random(f"sample {self.seed} {self.epoch} {place}").getrandbits(32))
                   for place in range(batch * self.batch_size, (batch + 1) * self.batch_size)]
