"""Many devices and many processes: meshes, sharded parameters, agreement between processes."""
