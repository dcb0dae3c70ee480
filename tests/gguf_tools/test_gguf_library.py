"""llama.cpp loads where CPython calls the platform `android`, which it does in Termux since 3.13."""

from __future__ import annotations

import subprocess
import sys


def test_llama_cpp_is_loaded_on_a_platform_called_android_whose_name_stays() -> None:
    program = """
import sys
from gguf_tools.library import llama_cpp
import numpy, ctypes, subprocess
sys.platform = "android"
print(hasattr(llama_cpp(), "llama_decode"), sys.platform)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "True android\n", done.stderr
