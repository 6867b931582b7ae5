"""From what a person types to a Python object: activation names, and `module.path:attribute`."""

import difflib
import importlib
import inspect
import os
import sys
from typing import Any

from initjax.errors import InputError

# Names that JAX spells otherwise. `gelu` itself stays what jax.nn.gelu is by default, the tanh form.
EXTRA_NAMES = ("erf", "gelu_exact", "identity", "linear")
FAMILIAR = (
    *("relu", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "swish", "mish", "softplus", "soft_sign", "sigmoid"),
    *("relu6", "hard_tanh", "hard_swish", "hard_sigmoid", "log_sigmoid", "squareplus", "tanh", "sin", "cos", "arctan"),
    *("abs", "square", *EXTRA_NAMES),
)


def activation(text: str) -> Any:
    """Find the activation named `text`: a name in jax.nn or jax.numpy, `erf`, `gelu_exact`, or `module.path:function`.

    Returns
    -------
    Activation : checked to be elementwise and real.

    Raises
    ------
    InputError : the name is unknown (the message offers the nearest ones), or the path does not lead to a function.
    """
    from initjax.gaussian import as_activation

    return as_activation(from_path(text, "an activation") if ":" in text else _named(text))


def _named(text: str) -> Any:
    import jax
    import jax.numpy as jnp

    def gelu_exact(x):
        return jax.nn.gelu(x, approximate=False)

    def identity(x):
        return x

    extra = {"erf": jax.scipy.special.erf, "gelu_exact": gelu_exact, "identity": identity, "linear": identity}
    if text in extra:
        return extra[text]
    for module in (jax.nn, jnp):
        found = getattr(module, text, None)
        if not text.startswith("_") and callable(found) and not inspect.isclass(found):
            return found
    near = difflib.get_close_matches(text.lower(), FAMILIAR, n=3)
    if not near:
        public = {name for module in (jax.nn, jnp) for name in dir(module) if not name.startswith("_")}
        near = difflib.get_close_matches(text.lower(), sorted(public), n=3)
    raise InputError(
        given=f"the activation {text!r}, which is no function in jax.nn or jax.numpy.",
        accepted="a name there, erf, gelu_exact (the erf form), or module.path:function for your own.",
        why="the theory needs the function itself, to integrate it against a Gaussian.",
        remedy=f"did you mean {' or '.join(near)}?" if near else "for example tanh, relu, gelu or silu.",
    )


def model(text: str) -> Any:
    """Find the model at `module.path:attribute`.

    Returns
    -------
    A Flax module, a factory of nnx modules, or a pair `(init_fn, apply_fn)`; it is checked further by the library.

    Raises
    ------
    InputError : the path does not import, has no such attribute, or leads to a class instead of an instance.
    """
    if ":" not in text:
        raise InputError(
            given=f"the model {text!r}, which has no colon.",
            accepted="module.path:attribute, for example my_package.networks:model",
            why="the part before the colon is imported, the part after it is the model in that module.",
            remedy=f"{text.rpartition('.')[0] or 'my_module'}:{text.rpartition('.')[2] or 'model'}",
        )
    found = from_path(text, "a model")
    if inspect.isclass(found):
        module = text.partition(":")[0]
        raise InputError(
            given=f"{text}, which is the class {found.__name__} and not an instance of it.",
            accepted="an instance, a factory `lambda rngs: Model(rngs=rngs)`, or a pair (init_fn, apply_fn).",
            why="a class has no depth, width or initializers until it is called with its arguments.",
            remedy=f"write `model = {found.__name__}(...)` in {module} and give {module}:model",
        )
    return found


def from_path(text: str, what: str) -> Any:
    """Import `module.path` and return the attribute after the colon; the current folder is importable."""
    module_path, _, attribute_path = text.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    if not module_path or not attribute_path:
        raise InputError(
            given=f"the path {text!r}.",
            accepted=f"module.path:attribute, where the attribute is {what}.",
            why="one side of the colon is empty.",
            remedy="for example my_package.networks:model",
        )
    try:
        found = importlib.import_module(module_path)
    except Exception as error:  # a user's module may fail in any way while it is imported
        missing = isinstance(error, ModuleNotFoundError) and f"{module_path}.".startswith(f"{error.name}.")
        raise InputError(
            given=f"{text}: importing {module_path} failed with {type(error).__name__}: {error}.",
            accepted=f"a module that Python can import from {os.getcwd()} or from the installed packages.",
            why="there is no such module." if missing else "the module was found, but it does not run to its end.",
            remedy=_folder_of(module_path) if missing else f"python -c 'import {module_path}' shows where it fails.",
        ) from error
    for name in attribute_path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            public = [known for known in dir(found) if not known.startswith("_")]
            near = difflib.get_close_matches(name, public, n=3, cutoff=0.5)
            raise InputError(
                given=f"{text}: {module_path} has no attribute {name!r}.",
                accepted=f"the name of {what} in that module.",
                why=f"it defines {', '.join(public[:12]) or 'nothing public'}{', ...' if len(public) > 12 else ''}.",
                remedy=f"did you mean {' or '.join(near)}?" if near else f"define {name} there, or name another one.",
            ) from None
    return found


def _folder_of(module_path: str) -> str:
    if module_path.endswith(".py") or "/" in module_path:
        dotted = module_path.removesuffix(".py").replace("/", ".").strip(".")
        return f"write the module as Python imports it: {dotted}"
    return "run from the folder that holds the module, or install its package."
