"""Environment of all tests; set here, before anything imports JAX or TFDS."""

import os
import pathlib
import tempfile

_CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()

# Compiling dominates the tests' time: optimise little, by the older and faster emitters
# (together a sixth of the time), and keep what took longer than half a second.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".strip()
)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE / "archs" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

# Datasets are prepared once per session, and never in the user's own folder.
_prepared = tempfile.TemporaryDirectory(prefix="archs-tests-")
os.environ["TFDS_DATA_DIR"] = _prepared.name
