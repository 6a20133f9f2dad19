"""An adapter that a network generates is plain LoRA once exported, and does the task as such."""

import pytest
import torch

import visionlora as vl
from tasks.fewshot.adapt import adapt
from tasks.fewshot.config import FewshotConfig
from tasks.fewshot.experiment import prepare
from visionlora.training import RunDirectory


@pytest.mark.slow
def test_a_generated_adapter_beats_zero_shot_after_export(tmp_path):
    config = FewshotConfig(method="hype-lora", steps=100, checkpoint_every=0, test_on="val")
    experiment = prepare(config)
    clip = experiment.backbone.clip
    before = experiment.score()
    experiment.inject(1)
    adapt(experiment, 1, experiment.shots(1), RunDirectory(tmp_path / "run"))
    live = experiment.score()
    report = vl.export(clip, tmp_path / "lora.safetensors", format="lora")
    vl.eject(clip)
    assert vl.inspect(report.path).methods == ("lora",)
    vl.load(clip, report.path)
    exported = experiment.score()
    assert exported.accuracy() > before.accuracy() + 3.0
    assert torch.equal(torch.as_tensor(exported.confusion()), torch.as_tensor(live.confusion()))
