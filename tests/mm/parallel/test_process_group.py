"""The collectives over all ranks, and who is who in a layout."""

import pytest

from foundation.errors import UserError
from mm.parallel.layout import Layout
from mm.parallel.process_group import Ranks
from tests.mm.training.launch import launch


def test_one_process_needs_no_process_group():
    ranks = Ranks.current()
    ranks.barrier(1)
    ranks.check_consistent("configuration", {})
    assert (ranks.rank, ranks.size, ranks.is_main) == (0, 1, True)
    assert ranks.all_reduce_sum(2, 3) == [2, 3] and ranks.all_reduce_max(4) == 4


@pytest.mark.slow
@pytest.mark.distributed
def test_barrier_names_the_rank_that_does_not_arrive(tmp_path):
    program = tmp_path / "late.py"
    program.write_text(
        "import time\n"
        "from mm.parallel.process_group import init_distributed\n"
        "with init_distributed() as ranks:\n"
        "    ranks.check_consistent('configuration', {'learning_rates': 1})\n"
        "    if ranks.rank == 1:\n"
        "        time.sleep(20)\n"
        "    else:\n"
        "        ranks.barrier(2)\n"
    )
    done = launch(program, tmp_path, 2)
    assert done.returncode != 0
    assert "RuntimeError: rank 0 waited 2 s" in done.output and "1" in done.output.split("failed")[1][:200]


@pytest.mark.slow
@pytest.mark.distributed
def test_check_consistent_names_the_ranks_that_differ(tmp_path):
    program = tmp_path / "odd.py"
    program.write_text(
        "from mm.parallel.process_group import init_distributed\n"
        "with init_distributed() as ranks:\n"
        "    ranks.check_consistent('configuration', {'learning_rates': ranks.rank == 1})\n"
    )
    done = launch(program, tmp_path, 2)
    assert done.returncode != 0 and "ranks 1 have another configuration than rank 0" in done.output


def test_ranks_of_a_layout_are_numbered_with_tp_fastest_and_pp_slowest():
    layout = Layout.of(16, dp_shard=2, tp=2, pp=2)
    assert layout == Layout(pp=2, dp_replicate=2, dp_shard=2, tp=2) and layout.dp_size == 4
    assert [layout.dp_rank(rank) for rank in range(16)] == [0, 0, 1, 1, 2, 2, 3, 3] * 2
    assert [rank for rank in range(16) if layout.reports_samples(rank)] == [0, 2, 4, 6]  # each dp_rank once


def test_all_data_parallel_ranks_share_one_copy_by_default():
    assert Layout.of(12, tp=2, pp=3) == Layout(pp=3, dp_replicate=1, dp_shard=2, tp=2)


@pytest.mark.parametrize(
    ("degrees", "parts"),
    [
        ({"tp": 3}, ("tp is 3", "number of ranks, 8")),
        ({"tp": 2, "pp": 3}, ("tp is 2", "pp is 3", "number of ranks, 8")),
        ({"tp": 2, "dp_shard": 3}, ("dp_shard is 3", "data-parallel ranks, 4")),
    ],
)
def test_degrees_that_do_not_divide_the_ranks_are_refused(degrees, parts):
    with pytest.raises(UserError) as caught:
        Layout.of(8, **degrees)
    assert all(part in str(caught.value) for part in parts)
