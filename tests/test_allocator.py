"""The C allocator settings of a training process."""

import os
import subprocess
import sys


def test_glibc_accepts_the_allocator_settings():
    code = "from burnish.harness.allocator import keep_freed_memory as keep; print(keep())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    has_glibc = sys.platform.startswith("linux") and "glibc" in (os.confstr("CS_GNU_LIBC_VERSION") or "")
    assert done.stdout.strip() == str(has_glibc)
