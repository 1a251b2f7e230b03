"""Writes a checkpoint of a sharded tree into a bucket, and reads it on other meshes.

python chunks_on_meshes.py DIRECTORY
"""

import sys

import jax
import numpy as np

from jina_jax.checkpoints import chunked_arrays
from jina_jax.parallel.mesh import make_mesh, shard_params, shardings
from jina_jax.storage import as_path
from train.run.bucket_checkpoints import begin_save
from train.run.checkpoints import _by_name, latest, restore

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
chunked_arrays.PART_BYTES = 512  # so that every array has many chunks
rng = np.random.default_rng(0)
tree = {
    "tokens.table": rng.normal(size=(37 * 8, 24)).astype(np.float32),
    "layers.up.kernel": rng.normal(size=(3, 16, 40)).astype(np.float32),
    "final_norm.scale": rng.normal(size=(257,)).astype(np.float32),
    "count": np.asarray(3, np.int32),
}
for data, fsdp in ((1, 8), (2, 4), (4, 2), (8, 1), (1, 1)):
    root = as_path(f"{sys.argv[1]}/{data}x{fsdp}")
    sharded = shard_params(tree, make_mesh(data, fsdp))
    begin_save(root, 1, _by_name(sharded), {}).write(lambda: None, 1)
    for other in ((1, 8), (2, 2), (8, 1), (1, 1)):
        found = latest(root)
        assert found is not None
        back = restore(found, tree, shardings(tree, make_mesh(*other)))
        for name, want in tree.items():
            np.testing.assert_array_equal(np.asarray(back[name]), want)
            assert back[name].sharding.shard_shape(want.shape) == shardings(tree, make_mesh(*other))[name].shard_shape(
                want.shape
            )
print("equal")
