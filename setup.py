# SPDX-License-Identifier: MIT
"""Builds minimal/_C, the fused operators, from csrc/. The rest of the metadata is in pyproject.toml.

    pip install --no-build-isolation .              # or -e . ; uses the torch that is installed
    python setup.py build_ext --inplace             # for working on csrc/

Without torch or a C++ compiler, or when the compiler fails, the install goes on as pure Python and says so in one line.
pip hides what a successful build prints unless it is called with -v, and offers no way round that: so
`python -m minimal.fused` says afterwards which path runs, and why.

    MINIMAL_BUILD_EXTENSION=0     do not try;  =1  fail when it cannot be built (for CI)
    MINIMAL_CUDA=0     leave the CUDA kernels out;  =1  fail when they cannot be built. Otherwise they are built where
                       torch has CUDA and nvcc is found
    MINIMAL_CUDA=cross     build them although torch has no CUDA, with the nvcc of CUDA_HOME: that compiles, links and
                           loads, which tests can use
    MINIMAL_SANITIZE=address,undefined     build with these sanitizers (see tests/sanitize.sh)
"""

import glob
import os
import shlex
import shutil
import sys

from setuptools import setup

KERNELS = "softmax", "attention", "decode", "linear", "block", "pointwise"
SOURCES = [f"csrc/{name}_cpu.cpp" for name in KERNELS] + ["csrc/ops.cpp"]
WANTED = os.environ.get("MINIMAL_BUILD_EXTENSION", "auto")  # 0, 1 or auto
CUDA = os.environ.get("MINIMAL_CUDA", "auto")  # 0, 1, auto or cross


def pure(reason):
    """Go on without the extension, or stop if it was asked for."""
    reason = " ".join(str(reason).split())
    if WANTED == "1":
        sys.exit(f"MINIMAL_BUILD_EXTENSION=1, but the fused operators cannot be built: {reason}")
    print(f"minimal: installing as pure Python, without the fused operators: {reason}", file=sys.stderr)
    return {}


def at_least_2_13():
    import torch

    return tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 13)


def with_cuda(cpp_extension):
    """Whether the CUDA kernels are built."""
    import torch

    if CUDA == "cross":
        cpp_extension.CUDA_HOME = os.environ.get("CUDA_HOME", "/usr/local/cuda")  # torch has set it to None
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    elif CUDA == "0" or (CUDA == "auto" and torch.version.cuda is None):
        return False
    reason = None
    if torch.version.cuda is None and CUDA != "cross":
        reason = f"torch {torch.__version__} has no CUDA"
    elif CUDA == "cross" and not at_least_2_13():  # before, the stable ABI alone could not name the stream
        reason = f"cross-building needs torch 2.13 or later, and this is {torch.__version__}"
    elif not os.path.exists(os.path.join(cpp_extension.CUDA_HOME or "", "bin", "nvcc")):
        reason = f"there is no bin/nvcc in CUDA_HOME={cpp_extension.CUDA_HOME}"
    if reason and CUDA != "auto":
        sys.exit(f"MINIMAL_CUDA={CUDA}, but the CUDA kernels cannot be built: {reason}")
    if reason:
        print(f"minimal: without the CUDA kernels: {reason}", file=sys.stderr)
    return reason is None


def extension():
    if WANTED == "0":
        return pure("MINIMAL_BUILD_EXTENSION=0")
    try:
        from torch.utils import cpp_extension
        from torch.utils.cpp_extension import BuildExtension
    except (ImportError, OSError) as error:  # OSError: a shared library of torch that does not load
        return pure(f"torch cannot be imported at build time ({error}); try pip install --no-build-isolation")

    # No -march=native: the binary must run on other machines. The kernels choose their instruction set when called.
    flags = ["-O3", "-fvisibility=hidden", f"-ffile-prefix-map={os.path.dirname(os.path.abspath(__file__))}/="]
    link = []
    if sanitize := os.environ.get("MINIMAL_SANITIZE"):
        flags += ["-O1", "-g", "-fno-omit-frame-pointer", f"-fsanitize={sanitize}", "-fno-sanitize-recover=all"]
        link += [f"-fsanitize={sanitize}"]

    class Build(BuildExtension):
        def run(self):
            try:
                compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
                if shutil.which(compiler) is None:
                    raise FileNotFoundError(f"no C++ compiler ({compiler} is not on the PATH; CXX names another)")
                super().run()
            except Exception as error:  # whatever went wrong, the Python files work without it
                if CUDA == "auto" and "csrc/ops_cuda.cu" in module.sources:
                    module.sources.remove("csrc/ops_cuda.cu")
                    print(f"minimal: again, without the CUDA kernels: {' '.join(str(error).split())}", file=sys.stderr)
                    return self.run()
                pure(error)
                self.extensions = []  # or installing would look for the file that was not made

    cuda = with_cuda(cpp_extension)
    Extension = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    needed = "0x020d000000000000" if cuda and at_least_2_13() else "0x020a000000000000"  # torch 2.13, 2.10
    shown = " ".join(f for f in flags if not f.startswith("-ffile-prefix-map"))
    module = Extension(
        "minimal._C",
        SOURCES + (["csrc/ops_cuda.cu"] if cuda else []),
        depends=sorted(glob.glob("csrc/*.h") + glob.glob("csrc/*.cu*")),  # which puts them into a source distribution
        define_macros=[("TORCH_TARGET_VERSION", needed), ("MINIMAL_FLAGS", f'"{shown}"')],
        extra_compile_args={"cxx": flags, "nvcc": ["-O3", "-Xcompiler", "-fvisibility=hidden"]},
        extra_link_args=link,
    )
    if CUDA == "cross":  # this torch has no such libraries; the stable ABI needs neither
        module.libraries = [name for name in module.libraries if name not in ("c10_cuda", "torch_cuda")]
    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


setup(**extension())
