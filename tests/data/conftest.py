"""A volume of noise."""

import numpy as np
import pytest
from scans import noise_volume


@pytest.fixture
def noise() -> np.ndarray:
    return noise_volume()
