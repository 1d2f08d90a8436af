"""Several ranks on this machine: forked processes that talk through gloo."""

import faulthandler
import gc
import os
import signal
import traceback
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from time import sleep

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_SECONDS = 60


def run_ranks(world, work, *arguments):
    """What `work(rank, *arguments)` returns on each of `world` ranks; an error on one is raised here.

    Forked, so that no process imports torch again. They end together, or with the timeout of a collective.
    """
    with TemporaryDirectory() as folder:
        context = mp.get_context("fork")
        processes = [
            context.Process(target=_rank, args=(rank, world, folder, work, arguments)) for rank in range(world)
        ]
        gc.collect()
        for process in processes:
            process.start()
        for process in processes:
            process.join(2 * TIMEOUT_SECONDS)
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGUSR1)  # writes where it is stuck
                sleep(1)
                process.kill()
                process.join()
        errors = [path.read_text() for kind in ("error-*", "stuck-*") for path in sorted(Path(folder).glob(kind))]
        assert not any(errors), "\n".join(errors)
        assert all(process.exitcode == 0 for process in processes), [process.exitcode for process in processes]
        return [torch.load(Path(folder, f"result-{rank}"), weights_only=False) for rank in range(world)]


def _rank(rank, world, folder, work, arguments):
    # What the parent left in cycles is not collected here: a process group would wait for threads that were not forked.
    gc.freeze()
    status = 1
    stuck = Path(folder, f"stuck-{rank}").open("w")  # noqa: SIM115 - open until the process ends
    faulthandler.register(signal.SIGUSR1, stuck, all_threads=True)
    try:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=TIMEOUT_SECONDS),
        )
        result = work(rank, *arguments)
        torch.save(result, Path(folder, f"result-{rank}"))
        dist.barrier()
        dist.destroy_process_group()
        status = 0
    except BaseException:  # noqa: BLE001 - told by the parent
        Path(folder, f"error-{rank}").write_text(f"rank {rank} of {world}: {traceback.format_exc()}")
    finally:
        os._exit(status)  # pytest's own exit hooks belong to the parent
