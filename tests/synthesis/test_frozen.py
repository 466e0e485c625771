"""The frozen synthesizer of the held-out measurement still draws what it drew."""

import hashlib

import numpy as np
import pytest

from benchmarks.synthesizer_2025 import synthesize_subject
from grcsf_fast.synthesis.template import load_template

# Of the synthesizer of 2026-11-26, before it was frozen, at 6 mm: the first digits of the SHA-256 of both masks, and
# the image's mean. The images were equal bit for bit; other processors round some of their voxels otherwise.
EXPECTED = [
    (0, {"skull": False}, "2e8af6ce9e09e5a1", 193.6176677869912),
    (1, {"skull": True}, "64b32abac7075e2b", 299.82685465284584),
    (7, {"total_ml": 40.0, "count": 3, "contrast": "template", "skull": True}, "a8f308b362262272", 257.49235756390385),
]


@pytest.mark.parametrize(("seed", "options", "masks", "mean"), EXPECTED)
def test_frozen_subjects(seed, options, masks, mean):
    subject = synthesize_subject(load_template(6.0), seed, **options)
    digest = hashlib.sha256(subject.lesion.numpy().tobytes() + subject.brain.numpy().tobytes()).hexdigest()
    assert digest.startswith(masks)
    assert float(np.mean(subject.image.numpy(), dtype=np.float64)) == pytest.approx(mean, rel=1e-5)
