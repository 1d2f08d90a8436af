"""Time and memory of a training step in each task's trainer, beside a plain PyTorch loop doing the same work.

    OMP_NUM_THREADS=1 python benchmarks/trainer_overhead.py --out benchmarks/results/trainer_overhead_cpu.json

Both take the recipe's model, batches, optimizer, schedule, clipping and averaged weights; the loop has a loss of its
own and no Lightning. They run in turn, each in a process of its own. A step is timed from its start to the start of the
next, loading included, by the clock and by the process's CPU time, which other work on the machine disturbs less; the
figures are medians over the rounds, and medians of the ratios of one round.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from children import measure, save, tell
from lightning_adam_mini.cli.application import Application
from lightning_adam_mini.cli.recipes import find_recipe

STEPS = {"llm/gpt2_tiny": 150, "vision/mnist5k": 60, "diffusion/digits": 100, "graph/gcn": 40, "graph/gat": 30}
WARM_UP = 10


Moment = tuple[float, float]


def now() -> Moment:
    """Seconds by the clock, and of this process's CPU."""
    return time.perf_counter(), time.process_time()


class Stamps(Callback):
    """The moments at which training steps start."""

    def __init__(self) -> None:
        self.moments: list[Moment] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.moments.append(now())


def language_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


class ImageLoss:
    """Cross-entropy of images that come as bytes and are normalised in the step."""

    def __init__(self, mean: list[float], std: list[float]) -> None:
        self.mean, self.std = (255 * torch.tensor(values)[:, None, None] for values in (mean, std))

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        images = batch["image"].float().sub_(self.mean).div_(self.std)
        return F.cross_entropy(model(images), batch["label"])


class DenoisingLoss:
    """Mean squared error of the noise at random timesteps of the cosine schedule."""

    def __init__(self) -> None:
        from diffusers import DDPMScheduler

        self.scheduler = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2")

    def __call__(self, model: nn.Module, images: Tensor) -> Tensor:
        noise, timesteps = torch.randn_like(images), torch.randint(1000, (len(images),))
        return F.mse_loss(model(self.scheduler.add_noise(images, noise, timesteps), timesteps).sample, noise)


class NodeLoss:
    """Cross-entropy of the training nodes; a GCN's normalised edges are computed once."""

    def __init__(self) -> None:
        self.edges: Any = None

    def __call__(self, model: Any, graph: Any) -> Tensor:
        if self.edges is None:
            self.edges = (model.edges(graph.edge_index, graph.num_nodes),)
        logits = model(graph.x, graph.edge_index, self.edges[0])
        return F.cross_entropy(logits[graph.train], graph.y[graph.train])


def plain_loop(app: Application, steps: int) -> list[Moment]:
    """Train without Lightning's trainer; the moments at which steps start."""
    task, data, trainer = app.model, app.datamodule, app.trainer
    losses = {
        "llm": lambda: language_loss,
        "vision": lambda: ImageLoss(data.transforms.mean, data.transforms.std),
        "diffusion": DenoisingLoss,
        "graph": NodeLoss,
    }
    compute_loss = losses[type(task).__module__.split(".")[2]]()
    trainer.datamodule = data
    task.trainer = trainer
    data.prepare_data()
    data.setup("fit")
    task.configure_model()
    model = task.model
    optimizer = task.optimizer_factory.build(task)
    scheduler = task.schedule.build(optimizer, steps)
    decay = getattr(task, "ema_decay", None)
    update = torch.optim.swa_utils.get_ema_multi_avg_fn(decay or 0.0)
    average = AveragedModel(model, multi_avg_fn=update) if decay else None
    moments: list[Moment] = []
    while len(moments) < steps:
        for batch in data.train_dataloader():
            moments.append(now())
            loss = compute_loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            if trainer.gradient_clip_val:
                nn.utils.clip_grad_norm_(model.parameters(), trainer.gradient_clip_val)
            optimizer.step()
            scheduler.step()
            if average is not None:
                average.update_parameters(model)
            if len(moments) % trainer.log_every_n_steps == 0:
                loss.item()
            if len(moments) == steps:
                break
    return moments


def child(kind: str, recipe: str, steps: int, folder: str) -> None:
    """Train in this process and print what it took."""
    options = ["--trainer.max_steps", str(steps), "--trainer.max_epochs", "-1", "--trainer.limit_val_batches", "0"]
    options += ["--trainer.num_sanity_val_steps", "0", "--trainer.enable_progress_bar", "false", "--run_dir", folder]
    app = Application(["--config", str(find_recipe(recipe)), *options], run=False)
    if kind == "plain":
        moments = plain_loop(app, steps)
    else:
        app.trainer.callbacks.append(stamps := Stamps())
        app.trainer.fit(app.model, datamodule=app.datamodule)
        moments = stamps.moments
    clock, cpu = zip(*moments[WARM_UP:], strict=True)
    figures = {
        "step_milliseconds": 1000 * median(later - sooner for sooner, later in pairwise(clock)),
        "step_cpu_milliseconds": 1000 * median(later - sooner for sooner, later in pairwise(cpu)),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    tell(figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = []
    from tempfile import TemporaryDirectory

    for recipe in options.recipes:
        with TemporaryDirectory() as folder:
            rounds = []
            for number in range(options.rounds):
                order = ("trainer", "plain") if number % 2 else ("plain", "trainer")
                run_dirs = {kind: Path(folder) / f"{kind}-{number}" for kind in order}
                rounds.append({k: measure(__file__, k, recipe, STEPS[recipe], d) for k, d in run_dirs.items()})
        row = {"recipe": recipe, "steps": STEPS[recipe], "rounds": rounds}
        for name in ("step_milliseconds", "step_cpu_milliseconds", "peak_memory_bytes"):
            for kind in ("trainer", "plain"):
                row[f"{kind}_{name}"] = median(each[kind][name] for each in rounds)
            row[f"{name}_ratio"] = median(each["trainer"][name] / each["plain"][name] for each in rounds)
        rows.append(row)
        ratios = "  ".join(f"{name} x {row[f'{name}_ratio']:.3f}" for name in rounds[0]["plain"])
        print(f"{recipe:<18} {row['trainer_step_milliseconds']:8.2f} ms a step  {ratios}")
    save(options.out, {"rows": rows})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5])
    else:
        main()
