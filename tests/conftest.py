"""Eight fake devices, run-time shape checks, and warnings as errors for every test."""

import os
import subprocess
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook

# Nearly all of the time goes into compiling small programs: with fewer optimisations, and loops
# emitted in the elder way, it takes half.
QUICK = "--xla_backend_optimization_level=1 --xla_cpu_use_fusion_emitters=false"


def _known(flags):
    """XLA ends a process that names a flag it does not have."""
    probe = [sys.executable, "-c", "import jax; jax.devices()"]
    environment = os.environ | {"XLA_FLAGS": flags}
    return subprocess.run(probe, env=environment, capture_output=True).returncode == 0


# Read when the first program is compiled. A worker finds its parent's.
given, eight = os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"
if eight not in given:
    os.environ["XLA_FLAGS"] = " ".join([given, eight, QUICK if _known(QUICK) else ""])
# Where two programs must round alike.
EMITTERS = {"xla_cpu_use_fusion_emitters": True} if QUICK in os.environ["XLA_FLAGS"] else {}

CACHE = {
    "jax_compilation_cache_dir": os.path.expanduser("~/.cache/jaxrobust/xla"),
    "jax_persistent_cache_min_compile_time_secs": 0.3,
}
for _setting in CACHE.items():
    jax.config.update(*_setting)


def child_environment(**variables):
    """What a process with its own devices is started with; it finds what others have compiled."""
    own = {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace(eight, ""), "MPLBACKEND": "agg"}
    cache = {name.upper(): str(value) for name, value in CACHE.items()}
    return os.environ | own | cache | variables


# Shapes and types in the package's annotations are checked at every call the tests make.
install_import_hook("jaxrobust", "beartype.beartype")

# The same drawn cases every time, so that a failure belongs to the change that shows it;
# `pytest --hypothesis-profile=default` draws new ones.
hypothesis.settings.register_profile("same_cases", derandomize=True, database=None)
hypothesis.settings.load_profile("same_cases")


def pytest_collection_modifyitems(items):
    """Files with slow tests first: one that begins last would keep a single worker busy alone."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(autouse=True, scope="module")
def _few_mappings():
    """After a file, drop compiled programs before there are too many for one process."""
    from experiments.records import forget_programs

    yield
    forget_programs()
