"""What is special about runs under Ray. Whole runs are in test_end_to_end, disturbed ones in test_ray_faults."""

from burnish.harness.config_hardware import Ray
from burnish.harness.errors import ConfigError, TrainingError
from burnish.launch.ray_cluster import cluster
from burnish.launch.ray_train import deterministic
from burnish.launch.resources import detect


def test_a_process_may_start_one_cluster_after_the_other():
    for _ in range(2):
        with cluster(Ray(type="ray"), detect()):
            pass


def test_only_what_a_restart_may_cure_is_tried_again():
    assert isinstance(deterministic(ConfigError("a wrong key")), ConfigError)
    assert isinstance(deterministic(MemoryError("no room")), TrainingError)
    assert "micro_batch_size" in str(deterministic(MemoryError("no room")))
    assert deterministic(RuntimeError("connection reset by peer")) is None
