"""What programs are compiled with on each kind of device."""

import jax

from jina_jax.model.device import compiler_options

OPTION = "xla_tpu_scoped_vmem_limit_kib"


def test_some_tpus_have_options_and_those_of_the_user_stay(monkeypatch):
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    assert {compiler_options(kind)[OPTION] for kind in ("TPU v5 lite", "TPU v5")} == {"65536", "49152"}
    assert compiler_options("TPU v4") == compiler_options(None) == compiler_options(jax.devices()[0].device_kind) == {}
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--{OPTION}=20000")
    assert compiler_options("TPU v5 lite") == {}
