"""Time of a program's parts, kept over its interruptions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.run.clock import Clock


def test_parts_add_up_over_interruptions_and_compiling_is_a_share_of_them(tmp_path):
    clock = Clock(tmp_path / "seconds.json")
    with clock.part("nothing"):
        pass
    with pytest.raises(KeyboardInterrupt), clock.part("work"):
        jax.jit(lambda x: jnp.sin(x) * 3)(np.ones(3)).block_until_ready()
        raise KeyboardInterrupt
    first = clock.spent()["work"]
    assert 0 < first.compiling < first.seconds
    again = Clock(tmp_path / "seconds.json")  # as another process has it
    with again.part("work"):
        pass
    second = again.spent()["work"]
    assert second.seconds > first.seconds and second.compiling == first.compiling
    assert [*again.spent()] == ["nothing", "work"] and again.spent()["nothing"].compiling == 0


def test_compiling_outside_a_part_is_not_counted(tmp_path):
    clock = Clock(tmp_path / "seconds.json")
    with clock.part("work"):
        pass
    jax.jit(lambda x: jnp.cos(x) * 5)(np.ones(3)).block_until_ready()
    assert clock.spent()["work"].compiling == 0
