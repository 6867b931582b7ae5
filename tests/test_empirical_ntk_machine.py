"""The empirical NTK on a machine: the memory it takes against the memory foreseen, and several devices against one."""

import os
import subprocess
import sys
import textwrap

import pytest

pytestmark = pytest.mark.slow  # each starts a process


def run(program, **environment):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_kernel_is_the_same_on_one_and_on_four_devices():
    run(
        """
        import jax
        jax.config.update("jax_enable_x64", True)
        import jax.numpy as jnp
        import initjax as ij

        devices = jax.local_devices()
        assert len(devices) == 4
        params = {"w": jax.random.normal(jax.random.key(1), (3, 4)), "v": jax.random.normal(jax.random.key(2), (8, 3))}
        apply = lambda p, x: jnp.tanh(x.reshape(-1, 2, 3) @ p["w"]).reshape(-1, 8) @ p["v"]
        x = jax.random.normal(jax.random.key(0), (11, 6))
        for outputs, mirrored in (("trace", (1, 0)), ("full", (1, 0, 3, 2))):
            for count in (3, 4):  # odd and even rings close differently
                one = ij.empirical_ntk(apply, outputs=outputs, devices=devices[:1])
                ring = ij.empirical_ntk(apply, outputs=outputs, devices=devices[:count])
                kernel = ring(params, x)
                # sums of a dozen products, in another order
                assert abs(kernel - one(params, x)).max() < 1e-13 * abs(kernel).max()
                assert (kernel == kernel.transpose(mirrored)).all()
                assert abs(ring(params, x, x[:7]) - kernel[:, :7]).max() < 1e-13 * abs(kernel).max()
        small = ij.empirical_ntk(apply, memory=20_000)(params, x)  # several tiles of the ring
        assert abs(small - ij.empirical_ntk(apply)(params, x)).max() < 1e-13 * abs(small).max()
        """,
        XLA_FLAGS="--xla_force_host_platform_device_count=4",
    )


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs the peak memory that Linux keeps")
def test_memory_is_as_foreseen():
    """What the process takes beyond what it held before, with all features kept and within a budget.

    XLA's threads have buffers of their own, 30 to 50 MB, which count less the more there is to do.
    """
    out = run(
        """
        import jax, jax.numpy as jnp
        import initjax as ij

        def peak():
            with open("/proc/self/status") as status:
                return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

        w = [jax.random.normal(jax.random.key(i), s) / 16 for i, s in enumerate([(64, 128), (128, 128), (128, 4)])]
        apply = lambda p, x: jnp.tanh(jnp.tanh(x @ p[0]) @ p[1]).mean(1) @ p[2]
        x = jax.random.normal(jax.random.key(9), (512, 16, 64))
        for memory in (None, "180MB"):
            ntk_fn = ij.empirical_ntk(apply, memory=memory, devices=jax.local_devices()[:1])
            foreseen = ntk_fn.explain(w, x).bytes
            ntk_fn(w, x[:8])
            with open("/proc/self/clear_refs", "w") as refs:
                refs.write("5")
            before = peak()
            kernel = jax.block_until_ready(ntk_fn(w, x))
            print(foreseen, peak() - before - kernel.nbytes)
        """
    )
    for line in out.splitlines():
        foreseen, taken = map(int, line.split())
        assert foreseen / 1.5 < taken < 1.5 * foreseen, out
