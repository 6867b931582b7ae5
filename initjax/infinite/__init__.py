"""Exact kernels of infinitely wide networks, from the program of the model as written."""

from initjax.infinite.kernels import Kernel as Kernel
from initjax.infinite.kernels import KernelFunction as KernelFunction
from initjax.infinite.kernels import Layer as Layer
from initjax.infinite.kernels import kernel_fn as kernel_fn

__all__ = ["Kernel", "KernelFunction", "Layer", "kernel_fn"]
