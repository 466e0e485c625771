"""How the packaged weights are trained and calibrated."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import synthesizer_2025
from benchmarks.calibrate import Subject, with_thresholds
from benchmarks.ship import averaged
from benchmarks.weights import TwoGenerators, started_from
from grcsf_fast import GRCSF
from grcsf_fast.data.volumes import Preprocessing
from grcsf_fast.pretrained.bundle import Bundle, load_bundle, save_bundle
from grcsf_fast.synthesis.subjects import synthesize_subject
from grcsf_fast.synthesis.template import load_template


def small_network(**config):
    torch.manual_seed(0)
    return GRCSF(2, 1, 1, (4, 8), 4, rcu_levels=(0,), **config).eval()


def test_training_starts_from_what_the_network_had_learnt():
    old, new = small_network(gcu=False), small_network(gcu=False, neighbours=1)
    with torch.no_grad():
        for weight in new.parameters():
            weight.add_(1.0)
    assert started_from(old.state_dict(), new) == []
    slices = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(new(slices), old(slices[:, 1:2]))


def test_weights_of_parts_that_had_none_stay_as_they_are():
    old, new = small_network(gcu_form="scale"), small_network()
    assert started_from(old.state_dict(), new) == ["gcu.0.strength"]
    assert not new.gcu[0].strength.any()


def test_subjects_come_from_two_generators_and_in_all_contrasts_by_turns():
    template = load_template(8.0)
    source = TwoGenerators(Preprocessing((8.0, 8.0, 8.0)), 0)
    turns = [("frozen", "random", other, "random") for other in ("t2", "flair", "pd")]
    for seed, turn in enumerate(itertools.chain(*turns, turns[0])):
        drawn = source.draw(template, seed, 50.0, None)
        if turn == "frozen":
            expected = synthesizer_2025.synthesize_subject(template, seed, total_ml=50.0)
        else:
            expected = synthesize_subject(template, seed, total_ml=50.0, contrast=turn)
        assert torch.equal(drawn.image, expected.image)
        assert torch.equal(drawn.lesion, expected.lesion)
        assert drawn.lesion.any()


def test_the_mean_of_the_weights_of_one_chain_of_trainings(tmp_path):
    first = load_bundle(save_bundle(Bundle(small_network(), None, Preprocessing((2.0, 2.0, 2.0))), tmp_path / "a"))
    network = small_network()
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(1.0)
    first = replace(first, card={"history": ["a"]})
    last = replace(first, network=network, card={"history": ["a", "b", "c"]})
    found = averaged([last, first], [1, 3])
    old, new = first.network.state_dict(), last.network.state_dict()
    for name, values in found.network.state_dict().items():
        torch.testing.assert_close(values, 0.75 * old[name] + 0.25 * new[name])
    assert found.card["history"] == ["a", "b", "c", "the mean of the weights after number 3 and 1 of this list, 1 : 3"]
    assert last.card["history"] == ["a", "b", "c"]
    with pytest.raises(ValueError, match=r"expected trainings of one chain, found one after .+ beside "):
        averaged([last, replace(first, card={"history": ["x"]})], [1, 1])


def calibrated(in_healthy_heads: float) -> Bundle:
    """By a lesion found at 0.9 with a false rim of 0.35, and 1,000 voxels of this probability in a healthy head."""
    truth, found, healthy = np.zeros((20, 20, 20), bool), np.zeros((20, 20, 20)), np.zeros((20, 20, 20))
    truth[5:10, 5:10, 5:10] = True
    found[4:11, 4:11, 4:11] = 0.35
    found[truth] = 0.9
    healthy[:10, :10, :10] = in_healthy_heads
    bundle = Bundle(small_network(), None, Preprocessing((2.0, 2.0, 2.0)))
    image = torch.zeros(20, 20, 20)
    return with_thresholds(bundle, [Subject(image, image, truth)], [found], [healthy])


def test_thresholds_are_the_best_of_those_that_spare_healthy_heads():
    chosen = calibrated(in_healthy_heads=0.1)
    assert (chosen.probability_threshold, chosen.hysteresis_threshold) == (0.4, 0.0)
    chosen = calibrated(in_healthy_heads=0.85)
    assert (chosen.probability_threshold, chosen.hysteresis_threshold) == (0.4, 0.9)


def test_where_healthy_heads_cannot_be_spared_what_marks_least_is_chosen(capsys):
    chosen = calibrated(in_healthy_heads=1.0)
    assert chosen.probability_threshold == 0.4
    assert "8.00 mL at most in healthy heads" in capsys.readouterr().out
