"""Tests of bench.py: what its figures rest on."""
import contextlib
import io
import re
from argparse import Namespace

import bench
from tests.fixtures import SMALL


def test_bench_flops_reading_once_saves_operations_and_changes_nothing():
    with contextlib.redirect_stdout(io.StringIO()) as said:
        bench.bench_flops(Namespace(size=64, runs=1), **SMALL)  # asserts equal outputs
    cost = [tuple(map(float, pair)) for pair in re.findall(r"(\S+) or (\S+) G", said.getvalue())]
    assert len(cost) == 4 and cost[0][0] == cost[0][1]
    assert all(every > once > cost[0][1] for every, once in cost[1:]), cost
