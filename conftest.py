"""Settings of every test process and its children: offline, no telemetry, quiet; without a GPU the CPU, and Triton's
interpreter for the kernels (it is chosen when triton is imported)."""

import os

SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
os.environ.update(SETTINGS)
if not any(map(os.path.exists, ("/proc/driver/nvidia/version", "/dev/nvidiactl"))):
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["TRITON_INTERPRET"] = "1"
