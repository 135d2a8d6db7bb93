"""Tests of bench.py: what its figures rest on."""
import contextlib
import io
import re
import tempfile
from argparse import Namespace
from pathlib import Path
from unittest import mock

import bench
import eval as evaluation
import train
from tests.fixtures import SMALL, error_of


def test_bench_ablate_resumes_and_never_repeats():
    """A choice trains once, its samplings share the weights, and every score is kept."""
    scored = mock.Mock(return_value=({"AP": 0.25, "AP50": 0.5}, []))
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()), \
            mock.patch.multiple(evaluation, evaluate=scored, picture_grid=mock.DEFAULT), \
            mock.patch.object(train, "main", wraps=train.main) as trained:
        args = Namespace(data="toy", pictures=16, amp="none", out=out)
        for sampling in ({}, {"sampling_steps": 5}) * 2:
            assert bench.score_of(args, 3, {"noise": "beta"}, sampling) == 0.25
        assert trained.call_count == 1
        assert Path(out, "toy-16-none", "noise=beta-seed=3", "last.pth").exists()
        cfgs = [call.args[0].cfg for call in scored.call_args_list]  # the first in training
        assert [(c.noise, c.sampling_steps) for c in cfgs] == [("beta", n) for n in (3, 3, 5)]
        trained.side_effect = lambda argv: 2
        assert "goes on" in error_of(bench.score_of, args, 4, {}, {}, kind=SystemExit)


def test_bench_flops_reading_once_saves_operations_and_changes_nothing():
    with contextlib.redirect_stdout(io.StringIO()) as said:
        bench.bench_flops(Namespace(size=64, runs=1), **SMALL)  # asserts equal outputs
    cost = [tuple(map(float, pair)) for pair in re.findall(r"(\S+) or (\S+) G", said.getvalue())]
    assert len(cost) == 4 and cost[0][0] == cost[0][1]
    assert all(every > once > cost[0][1] for every, once in cost[1:]), cost
