"""Predicts from plain text as `evaluate` does from prepared data. MLflow loads it from the registered model.

A row of the input holds the text, the prompt, or the question and its context. For a model that was trained on chats, a
prompt is a message of the user, or a JSON list of messages. A row of the output holds `prediction` as in the
report's examples, and the probability of each label where the task has labels. Rows are computed one by one, so that none
depends on its neighbours.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from transformers import GenerationConfig

from .answers import ContextWindow, answer
from .chats import chat_prompt_ids
from .decoding import greedy, plain_text, predicted_label, predicted_labels, stop_ids
from .encoding import AddedTokens, EncodedWindow, context_windows, prompt_parts, text_ids
from .quantized import in_4_bits

if TYPE_CHECKING:
    import pandas as pd

SETTINGS = "mixtune_serving.json"
"""File in the model folder, which mixtune writes when it registers the model."""


class Predictor:
    """A registered model that answers rows of plain text.

    Args:
        folder: model folder in Hugging Face format, with the file `SETTINGS`.
    """

    def __init__(self, folder: Path) -> None:
        self._settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        auto: Any = getattr(transformers, self._settings["auto_class"])
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # Without a GPU, the weights are not quantised: answers then differ a little from those that were measured.
        options = in_4_bits(device) if self._settings.get("quantized") and device.type == "cuda" else {}
        model = auto.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, **options
        )
        self._model = model.eval().to(device)
        names: dict[int, str] = model.config.id2label or {}
        self._labels = [names[index] for index in sorted(names)]
        self._added = AddedTokens.by(self._tokenizer)
        self._stops = stop_ids(getattr(model, "generation_config", None), self._tokenizer)
        if model.can_generate():
            model.generation_config = GenerationConfig()  # sampling or penalties of the base model do not apply

    def predict(self, data: pd.DataFrame, params: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """Returns the prediction for each row.

        Args:
            data: one column of texts or prompts, or the columns `question` and `context`.
            params: `max_new_tokens`, for generation.
        """
        limit = int((params or {}).get("max_new_tokens") or self._settings["max_new_tokens"] or 1)
        rows = data.to_dict("records") if "question" in data.columns else data.iloc[:, 0].tolist()
        with torch.inference_mode():
            return [_ANSWERS[self._settings["target"]](self, row, limit) for row in rows]

    def _label(self, text: str, _: int) -> dict[str, Any]:
        prediction, shares = predicted_label(self._labels, self._logits(text))
        return {"prediction": prediction, "probabilities": dict(zip(self._labels, shares, strict=True))}

    def _several_labels(self, text: str, _: int) -> dict[str, Any]:
        prediction, shares = predicted_labels(self._labels, self._logits(text))
        return {"prediction": prediction, "probabilities": dict(zip(self._labels, shares, strict=True))}

    def _number(self, text: str, _: int) -> dict[str, Any]:
        return {"prediction": float(self._logits(text)[0])}

    def _answers(self, row: dict[str, str], _: int) -> dict[str, Any]:
        context = str(row["context"])
        (encoded,) = context_windows(self._tokenizer, [str(row["question"])], [context], self._settings["max_length"])
        if not encoded.windows:
            return {"prediction": None, "problem": "the question leaves no space for the context"}
        windows = [ContextWindow(self._span_logits(one), one.context_from, one.offsets) for one in encoded.windows]
        return {"prediction": answer(windows, context).text}

    def _text(self, prompt: str, limit: int) -> dict[str, Any]:
        if self._settings.get("chat"):
            return self._answered(chat_prompt_ids(self._tokenizer, _messages(prompt)), limit)
        first, text = prompt_parts(self._tokenizer, self._added, self._tokenizer(prompt, verbose=False)["input_ids"])
        positions = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        # As in training, a prompt that is too long loses its beginning.
        longest = max(0, min(self._settings["max_length"], positions or self._settings["max_length"]) - len(first) - 1)
        return self._answered([*first, *text[max(0, len(text) - longest) :]], limit)

    def _answered(self, ids: list[int], limit: int) -> dict[str, Any]:
        positions = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        room = limit if positions is None else min(limit, positions - len(ids))
        if room < 1:
            return {"prediction": ""}
        made = self._model.generate(
            **self._inputs(ids), generation_config=greedy(room, self._stops, self._tokenizer.pad_token_id)
        )
        return {"prediction": plain_text(self._tokenizer, made[0, len(ids) :].tolist(), self._stops)}

    def _logits(self, text: str) -> np.ndarray:
        ids = text_ids(self._tokenizer, text, self._settings["max_length"])
        logits: torch.Tensor = self._model(**self._inputs(ids)).logits
        return logits[0].double().cpu().numpy()

    def _span_logits(self, window: EncodedWindow) -> np.ndarray:
        inputs = self._inputs(window.tokens)
        if window.second_from >= 0:
            types = torch.zeros_like(inputs["input_ids"])
            types[:, window.second_from :] = 1
            inputs["token_type_ids"] = types
        spans = self._model(**inputs)
        return torch.stack([spans.start_logits[0], spans.end_logits[0]], 1).double().cpu().numpy()

    def _inputs(self, ids: list[int]) -> dict[str, torch.Tensor]:
        input_ids = torch.tensor([ids], device=self._model.device)
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def _messages(prompt: str) -> list[dict[str, Any]]:
    """Returns the messages in a text that is a JSON list of them; any other text is one message of the user."""
    if prompt.lstrip().startswith("["):
        with contextlib.suppress(ValueError):
            found = json.loads(prompt)
            if found and all(isinstance(one, dict) and "role" in one for one in found):
                return list(found)
    return [{"role": "user", "content": prompt}]


_ANSWERS: dict[str, Callable[[Predictor, Any, int], dict[str, Any]]] = {
    "label": Predictor._label,
    "labels": Predictor._several_labels,
    "number": Predictor._number,
    "answers": Predictor._answers,
    "text": Predictor._text,
}
"""What the model predicts, as in mixtune's table of tasks."""


def _load_pyfunc(path: str) -> Predictor:
    """Loads a registered model. MLflow calls this function by its name."""
    return Predictor(Path(path))
