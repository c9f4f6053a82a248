"""Classification of texts and images: encoding, the summed loss, the metrics, the answers."""

import io

import numpy as np
import pytest
import torch
from backbones import LABELS, make_config, save_backbone
from burnish.harness import models
from burnish.harness.errors import ConfigError, DataError
from burnish.harness.evaluate import eval_mode, evaluate
from burnish.harness.generate import generate
from burnish.harness.tasks import RowError, common, get_task
from burnish.harness.tasks.image_classification import ImageProcessor
from PIL import Image
from torch.nn.functional import cross_entropy

TEXTS = get_task("sequence_classification")
IMAGES = get_task("image_classification")
ROWS = [
    {"text": "red dog sees one cat", "label": "two"},
    {"text": "blue bird", "label": "one"},
    {"text": "a small cat likes the big dog under three birds", "label": "three"},
]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = save_backbone("bert", tmp_path_factory.mktemp("bert"))
    config = make_config("bert", folder)
    return config, models.load_model(config, labels=LABELS), models.load_processor(config)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    folder = save_backbone("vit", tmp_path_factory.mktemp("vit"))
    config = make_config("vit", folder)
    return config, models.load_model(config, labels=LABELS), models.load_processor(config)


def rejected(task, row, processor, config):
    with pytest.raises(RowError) as caught:
        task.encode(row, processor, config, LABELS)
    return caught.value.kind


def test_labels_are_found_sorted_and_numbers_by_value(bert):
    config = bert[0]
    assert TEXTS.find_labels(ROWS, config) == ["one", "three", "two"]
    assert TEXTS.find_labels([{"label": n} for n in (10, 9, 2, 9)], config) == ["2", "9", "10"]
    named = make_config("bert", "x", task__labels=["b", "a"])
    assert TEXTS.find_labels(ROWS, named) == ["b", "a"]


def test_a_padded_batch_of_texts_has_the_loss_of_its_rows_alone(bert):
    config, model, tokenizer = bert
    examples = [TEXTS.encode(row, tokenizer, config, LABELS) for row in ROWS]
    together = TEXTS.loss(model, TEXTS.collate(examples, tokenizer, config), config)
    alone = [TEXTS.loss(model, TEXTS.collate([e], tokenizer, config), config) for e in examples]
    assert torch.allclose(together, sum(alone), rtol=1e-5)
    wide = TEXTS.collate(examples, tokenizer, config, 40)
    assert wide["input_ids"].shape == (3, 40)
    assert torch.allclose(TEXTS.loss(model, wide, config), together, rtol=1e-5)


def test_ignored_examples_count_for_nothing(bert):
    config, model, tokenizer = bert
    examples = [TEXTS.encode(row, tokenizer, config, LABELS) for row in ROWS]
    mixed = [examples[0], TEXTS.ignore(examples[1])]
    assert [TEXTS.num_supervised(e) for e in mixed] == [1, 0]
    one = TEXTS.loss(model, TEXTS.collate(mixed[:1], tokenizer, config), config)
    assert torch.allclose(TEXTS.loss(model, TEXTS.collate(mixed, tokenizer, config), config), one, rtol=1e-5)
    assert TEXTS.loss(model, TEXTS.collate(mixed[1:], tokenizer, config), config) == 0
    sums = [TEXTS.evaluate(model, TEXTS.collate(part, tokenizer, config), config) for part in (mixed, mixed[:1])]
    assert all(torch.allclose(value, sums[1][name]) for name, value in sums[0].items())


def test_text_pairs_have_their_own_token_types(bert):
    config, _, tokenizer = bert
    pair = TEXTS.encode({"text": "red dog", "text_pair": "blue cat", "label": "one"}, tokenizer, config, LABELS)
    alone = TEXTS.encode({"text": "red dog", "label": "one"}, tokenizer, config, LABELS)
    assert len(pair["input_ids"]) > len(alone["input_ids"])


def test_texts_that_cannot_be_examples_are_named(bert):
    config, _, tokenizer = bert
    assert rejected(TEXTS, {"text": " ", "label": "one"}, tokenizer, config) == "empty"
    assert rejected(TEXTS, {"text": 3, "label": "one"}, tokenizer, config) == "wrong_type"
    assert rejected(TEXTS, {"label": "one"}, tokenizer, config) == "missing_column"
    assert rejected(TEXTS, {"text": "a"}, tokenizer, config) == "no_label"
    assert rejected(TEXTS, {"text": "a", "label": "four"}, tokenizer, config) == "unknown_label"


@pytest.mark.parametrize("truncation", ["right", "left", "drop", "error"])
def test_long_texts_meet_the_truncation_policy(bert, truncation):
    _, _, tokenizer = bert
    config = make_config("bert", "x", data__max_length=3, data__truncation=truncation)
    row = {"text": "red dog sees one cat", "label": "one"}
    if truncation in ("drop", "error"):
        assert rejected(TEXTS, row, tokenizer, config) == "too_long"
        return
    ids = TEXTS.encode(row, tokenizer, config, LABELS)["input_ids"]
    whole = tokenizer(row["text"]).input_ids
    assert list(ids) == (whole[:3] if truncation == "right" else whole[-3:])


def test_metrics_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    draw = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(40, 4, generator=draw), torch.randint(3, (40,), generator=draw)
    targets[::7] = common.IGNORE
    counted = targets != common.IGNORE
    halves = [common.class_counts(logits[part], targets[part]) for part in (slice(0, 11), slice(11, 40))]
    got = common.summarise_classes({name: halves[0][name] + halves[1][name] for name in halves[0]})
    truth, answer = targets[counted], logits[counted].argmax(-1)
    assert got["accuracy"] == pytest.approx(metrics.accuracy_score(truth, answer))
    assert got["macro_f1"] == pytest.approx(metrics.f1_score(truth, answer, average="macro"))
    assert got["loss"] == pytest.approx(cross_entropy(logits[counted], truth).item(), rel=1e-6)


def test_label_smoothing_is_that_of_torch(vit):
    _, model, processor = vit
    config = make_config("vit", "x", task__label_smoothing=0.2)
    examples = [
        IMAGES.encode({"image": np.full((8, 8), n), "label": "one"}, processor, config, LABELS) for n in (9, 99)
    ]
    batch = IMAGES.collate(examples, processor, config)
    logits = model(pixel_values=batch["pixel_values"]).logits
    expected = cross_entropy(logits, batch["labels"], reduction="sum", label_smoothing=0.2)
    assert torch.allclose(IMAGES.loss(model, batch, config), expected)


def test_the_same_picture_in_any_form_becomes_the_same_pixels(vit, tmp_path):
    config, _, processor = vit
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    picture, stream = Image.fromarray(pixels), io.BytesIO()
    picture.save(stream, "png")
    picture.save(tmp_path / "picture.png")
    forms = [pixels, pixels.tolist(), pixels / 255, pixels[..., None], np.stack([pixels] * 3, -1), picture]
    forms += [stream.getvalue(), {"bytes": stream.getvalue()}, str(tmp_path / "picture.png")]
    for form in forms:
        example = IMAGES.encode({"image": form, "label": "two"}, processor, config, LABELS)
        assert (example["pixels"] == pixels.reshape(-1)).all()
        assert example["label"] == [1]


def test_pictures_are_resized_and_normalised():
    processor = ImageProcessor(image_size=4, num_channels=3, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.1))
    config = make_config("vit", "x")
    example = IMAGES.encode({"image": np.full((9, 5, 3), 255), "label": "one"}, processor, config, LABELS)
    batch = IMAGES.collate([example], processor, config)["pixel_values"]
    assert batch.shape == (1, 3, 4, 4)
    assert torch.allclose(batch[0, :, 0, 0], torch.tensor([2.5, 3.0, 7.0]))


def test_pictures_that_cannot_be_examples_are_named(vit, tmp_path):
    config, _, processor = vit
    (tmp_path / "text.png").write_text("no picture")
    for image in ([[1, 2], [3]], [[300]], [], str(tmp_path / "text.png"), str(tmp_path / "nowhere.png"), b"xx"):
        assert rejected(IMAGES, {"image": image, "label": "one"}, processor, config) == "bad_image"
    assert rejected(IMAGES, {"image": [["a"]], "label": "one"}, processor, config) == "wrong_type"
    assert rejected(IMAGES, {"label": "one"}, processor, config) == "missing_column"


def test_an_image_size_that_the_model_cannot_take_is_refused(tmp_path):
    config = make_config("vit", save_backbone("vit", tmp_path / "vit"), task__image_size=16)
    with pytest.raises(ConfigError, match=r"task\.image_size"):
        models.load_processor(config)


def test_answers_have_label_and_probability(bert, vit):
    config, model, tokenizer = bert
    answers = generate(model, tokenizer, TEXTS, ["red dog", ["a", "b"]], config)
    assert all(answer["label"] in LABELS and 0 < answer["probability"] <= 1 for answer in answers)
    config, model, processor = vit
    (answer,) = generate(model, processor, IMAGES, [np.zeros((8, 8)).tolist()], config)
    assert answer["label"] in LABELS


def test_evaluation_leaves_every_module_in_its_mode(bert):
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.BatchNorm1d(2)).train()
    model[1].eval()
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, True, False]


def test_an_evaluation_without_targets_is_an_error(bert):
    config, model, tokenizer = bert
    with pytest.raises(DataError, match="nothing to measure"):
        evaluate(model, [], TEXTS, config)
    example = TEXTS.ignore(TEXTS.encode(ROWS[0], tokenizer, config, LABELS))
    with pytest.raises(DataError, match="nothing to measure"):
        evaluate(model, [TEXTS.collate([example], tokenizer, config)], TEXTS, config)
