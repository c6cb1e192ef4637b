# SPDX-License-Identifier: MIT
"""Builds minimal/_C, the fused operators, from csrc/. The rest of the metadata is in pyproject.toml.

    pip install --no-build-isolation .              # or -e . ; uses the torch that is installed
    python setup.py build_ext --inplace             # for working on csrc/

Without torch or a C++ compiler, or when the compiler fails, the install goes on as pure Python and says so in one line.
pip hides what a successful build prints unless it is called with -v, and offers no way round that: so
`python -m minimal.fused` says afterwards which path runs, and why.

    MINIMAL_BUILD_EXTENSION=0     do not try;  =1  fail when it cannot be built (for CI)
    MINIMAL_SANITIZE=address,undefined     build with these sanitizers (see tests/sanitize.sh)
"""

import glob
import os
import shlex
import shutil
import sys

from setuptools import setup

SOURCES = ["csrc/ops.cpp", "csrc/softmax_cpu.cpp", "csrc/attention_cpu.cpp", "csrc/decode_cpu.cpp"]
WANTED = os.environ.get("MINIMAL_BUILD_EXTENSION", "auto")  # 0, 1 or auto


def pure(reason):
    """Go on without the extension, or stop if it was asked for."""
    reason = " ".join(str(reason).split())
    if WANTED == "1":
        sys.exit(f"MINIMAL_BUILD_EXTENSION=1, but the fused operators cannot be built: {reason}")
    print(f"minimal: installing as pure Python, without the fused operators: {reason}", file=sys.stderr)
    return {}


def extension():
    if WANTED == "0":
        return pure("MINIMAL_BUILD_EXTENSION=0")
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
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
                pure(error)
                self.extensions = []  # or installing would look for the file that was not made

    shown = " ".join(f for f in flags if not f.startswith("-ffile-prefix-map"))
    module = CppExtension(
        "minimal._C",
        SOURCES,
        depends=sorted(glob.glob("csrc/*.h")),  # also what puts the headers into a source distribution
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000"), ("MINIMAL_FLAGS", f'"{shown}"')],  # torch 2.10
        extra_compile_args=flags,
        extra_link_args=link,
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


setup(**extension())
