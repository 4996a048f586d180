"""Build the native library with the address and undefined-behaviour sanitizers, and run its tests on that build.

Usage: python tools/sanitize.py (needs cmake and a compiler with both; `make sanitize`)
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "sanitize"
TESTS = ("tests/kernels/test_native.py", "tests/kernels/test_layers.py", "tests/model/test_packed.py")
RUN = """
import sys, pytest
from herd.kernels import native
native.find = lambda: sys.argv[1]
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


def main() -> None:
    flags = "-fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all -fno-omit-frame-pointer -g"
    source = ROOT / "herd" / "kernels" / "cpp"
    subprocess.run(["cmake", "-S", source, "-B", BUILD, f"-DCMAKE_CXX_FLAGS={flags}"], check=True)
    # Without a number, make starts all compilers at once.
    jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count()))
    subprocess.run(["cmake", "--build", BUILD, "--parallel", jobs], check=True)
    # The sanitizer's own library has to be there before Python itself. Python's leaks at exit are not ours.
    runtime = subprocess.run(["gcc", "-print-file-name=libasan.so"], check=True, capture_output=True, text=True)
    # What was never written is NaN, so that whatever depends on it is found.
    options = "detect_leaks=0:max_malloc_fill_size=1073741824:malloc_fill_byte=255"
    environment = os.environ | {"LD_PRELOAD": runtime.stdout.strip(), "ASAN_OPTIONS": options}
    os.chdir(ROOT)
    os.execve(sys.executable, [sys.executable, "-c", RUN, str(BUILD / "herd_kernels.so"), *TESTS], environment)


if __name__ == "__main__":
    main()
