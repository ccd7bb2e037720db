"""Builds the compiled modules; everything else is in pyproject.toml.

`fastdistill._cpu` is built wherever there is a C++ compiler: the sources of csrc/cpu, of which
isa_*.cpp and exact_*.cpp once per instruction set, bf16_avx512.cpp for one. `fastdistill._cuda`
is built where nvcc is found. Neither needs torch. Without a compiler the install still succeeds,
in pure Python, and says so.

Environment: CXX (the compiler), FASTDISTILL_CUDA=0 (no CUDA module) or 1 (fail without it),
NVCC (the CUDA compiler).
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
X86 = platform.machine().lower() in ("x86_64", "amd64")

CPU_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    # What vectorised selects need; not -ffast-math: NaN, inf and signed zeros keep their meaning.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    # GCC 12 says them of its own AVX-512 header and of vectors passed to inlined functions.
    "-Wno-maybe-uninitialized",
    "-Wno-psabi",
    "-Wno-unknown-warning-option",  # clang knows the first under another name
]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [
    "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512",
]  # fmt: skip
# By the name of the file. Noise has the same bits everywhere: no product and sum in one rounding.
X86_FLAGS = {
    "isa_avx2": AVX2, "exact_avx2": AVX2, "isa_avx512": AVX512, "exact_avx512": AVX512,
    "bf16_avx512": AVX512,
}  # fmt: skip
AVX512_BF16 = "-mavx512bf16"  # of bf16_avx512; GCC knows it from version 10 on
EXACT_FLAGS = ["-ffp-contract=off"]


def find_nvcc():
    candidates = [os.environ.get("NVCC"), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    return next((c for c in candidates if c and shutil.which(c)), None)


def wants_cuda():
    return os.environ.get("FASTDISTILL_CUDA", "").strip()


class BuildKernels(build_ext):
    """Per-file flags, several compilers at once, and objects kept while their sources are."""

    def run(self):
        if not self.compiler_path():
            print(
                "fastdistill: no C++ compiler was found, so the CPU kernels are not built and the "
                "package installs in pure Python (backend 'reference'). Install g++ or clang++ "
                "and reinstall to have them.",
                file=sys.stderr,
            )
            self.extensions = []
            return
        super().run()

    @staticmethod
    def compiler_path():
        names = [os.environ.get("CXX", "").split(" ")[0], "g++", "clang++", "c++"]
        return next((found for name in names if name and (found := shutil.which(name))), None)

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Not in setuptools' own folder, which an editable install throws away.
        kind = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        objects = ROOT / "build" / "objects" / kind / ext.name.rpartition(".")[2]
        objects.mkdir(parents=True, exist_ok=True)
        if ext.name.endswith("._cuda"):
            self.build_cuda(ext, target, objects)
        else:
            self.build_cpu(ext, target, objects)

    def build_cpu(self, ext, target, objects):
        cxx = self.compiler_path()
        flags = [*CPU_FLAGS, *python_includes()]
        link = []
        if X86:
            flags.append("-DFD_X86")
        if compiles(
            cxx, ["-fopenmp"], "#include <omp.h>\nint main() { return omp_in_parallel(); }"
        ):
            flags.append("-fopenmp")
            link.append("-fopenmp")
        elif compiles(cxx, ["-fopenmp-simd"], "int main() { return 0; }"):
            flags.append("-fopenmp-simd")  # one thread, still vectorised
        sources = [Path(s) for s in ext.sources]
        if not X86:
            sources = [s for s in sources if s.stem not in X86_FLAGS]
        bf16 = [AVX512_BF16] if X86 and compiles(cxx, [AVX512_BF16], "int main() {}") else []
        jobs = [
            ([cxx, *flags, *file_flags(s.stem, bf16), "-c", str(s)], s, objects / f"{s.stem}.o")
            for s in sources
        ]
        self.compile_and_link(jobs, ext, [cxx, "-shared", *link], target)

    def build_cuda(self, ext, target, objects):
        nvcc = find_nvcc()
        flags = ["-std=c++17", "-O3", "-ftz=true", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        targets = [
            "-gencode=arch=compute_80,code=sm_80",
            "-gencode=arch=compute_90,code=[sm_90,compute_90]",
        ]
        cxx = self.compiler_path()
        host = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", *python_includes()]
        jobs = []
        for s in map(Path, ext.sources):
            cuda = s.suffix == ".cu"
            command = [nvcc, *flags, *targets, "-c", str(s)] if cuda else [cxx, *host, "-c", str(s)]
            jobs.append((command, s, objects / f"{s.stem}.o"))
        # The static runtime's symbols stay private: another copy may be in the process.
        link = [nvcc, "-shared", "-cudart", "static", "-Xlinker", "--exclude-libs,ALL"]
        self.compile_and_link(jobs, ext, link, target)

    def compile_and_link(self, jobs, ext, link, target):
        newest_header = max(
            (p.stat().st_mtime for d in ext.depends for p in [ROOT / d]), default=0.0
        )
        pending = [
            [*command, "-o", str(out)]
            for command, source, out in jobs
            if self.force
            or not out.exists()
            or out.stat().st_mtime < max(source.stat().st_mtime, newest_header)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, pending))
        outputs = [str(out) for _, _, out in jobs]
        if pending or not target.exists():
            run([*link, *outputs, "-o", str(target)])


def file_flags(stem, bf16):
    exact = EXACT_FLAGS if stem.startswith("exact_") else []
    return X86_FLAGS.get(stem, []) + exact + (bf16 if stem == "bf16_avx512" else [])


def run(command):
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True, cwd=ROOT)


def compiles(cxx, flags, code):
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text(code)
        command = [cxx, *flags, str(source), "-o", str(source.with_suffix(".out"))]
        return subprocess.run(command, capture_output=True).returncode == 0


def python_includes():
    import pybind11

    return [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]


def files(pattern):
    return sorted(str(p.relative_to(ROOT)) for p in ROOT.glob(pattern))


def extensions():
    cpu_headers = files("csrc/cpu/*.h") + files("csrc/cpu/*.inl")
    built = [Extension("fastdistill._cpu", files("csrc/cpu/*.cpp"), depends=cpu_headers)]
    if wants_cuda() != "0" and find_nvcc():
        sources = files("csrc/cuda/*.cu") + files("csrc/cuda/*.cpp")
        headers = files("csrc/cuda/*.cuh") + files("csrc/cuda/*.h")
        built.append(Extension("fastdistill._cuda", sources, depends=headers))
    elif wants_cuda() == "1":
        raise SystemExit("FASTDISTILL_CUDA=1, but nvcc was not found (set NVCC or PATH)")
    return built


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels})
