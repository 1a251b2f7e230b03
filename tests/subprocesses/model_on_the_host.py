"""Checks where the arrays of a training run are, with two devices, the second in place of the host.

The first device holds nothing but the arguments of a step, and a resumed run makes no state but the
checkpoint's.
"""

import contextlib
import sys
from pathlib import Path

import jax

from helpers.training import run_config, stages, write_datasets
from jina_jax.checkpoints.native import load_checkpoint
from jina_jax.model.parameters import variables
from train.config import MeshConfig
from train.run import loop

device, host = jax.devices()
loop._host = lambda: host
# The slack is in bytes, for scalars, constants, and a batch that is still to come.
fitted_step, slack = loop.fitted_step, 50_000


def watched_step(*arguments):
    step = fitted_step(*arguments)

    def watched(state, frozen, batch):
        given = sum(x.nbytes for x in jax.tree.leaves((state, frozen, batch)))
        held = {x.unsafe_buffer_pointer(): x.nbytes for x in jax.live_arrays() if x.devices() == {device}}
        held = sum(held.values())
        assert given > 10 * slack and held < given + slack, (held, given)
        steps.append(step)
        if len(steps) == 2:
            raise InterruptedError
        return step(state, frozen, batch)

    return watched


steps, loop.fitted_step = [], watched_step
workdir = Path(sys.argv[1])
stage = stages(write_datasets(workdir), steps=2)["pairs"]
config = run_config(stage, mesh=MeshConfig(data=1), checkpoint_every=1)
with contextlib.suppress(InterruptedError):
    loop.train(config, workdir / "run", progress=False)
loop.initial_state = None
assert loop.train(config, workdir / "run", progress=False) and len(steps) == 3
arrays = {"on the device": load_checkpoint(workdir / "run" / "model")}
with jax.default_device(host):
    arrays["on the host"] = load_checkpoint(workdir / "run" / "model")
places = {name: {d for x in variables(encoder).values() for d in x.get_value().devices()} for name, encoder in arrays.items()}
assert places == {"on the device": {device}, "on the host": {host}}, places
print("equal")
