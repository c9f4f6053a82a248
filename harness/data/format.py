"""Rows -> token ids and loss masks for causal language models: chat, prompt/completion, alpaca, plain text.

With a chat template the whole conversation is rendered once, and the place of each answer is found by rendering the
conversation up to it; where the shorter rendering is not a prefix of the longer one, the row is refused. Without one
(no template in the tokenizer, or data.chat_template: none) prompt and completion are joined and the end token follows,
token for token as TRL's SFTTrainer does it. T tokens.
"""

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..tasks import Example, RowError

NO_TEMPLATE = "none"
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
ALPACA = (
    "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
Messages = list[dict[str, Any]]
Marked = tuple[list[int], list[bool]]
"""Token ids, and which of them are learned."""


def encode_causal_lm(row: dict[str, Any], tokenizer: Any, config: Any, format: str = "auto") -> Example:
    """{input_ids int32[T], loss_mask uint8[T]}, and num_truncated int32[1] where tokens were cut off.

    Raises RowError for a row that is malformed, too long under truncation drop or error, or without a token to learn;
    ConfigError where a chat meets a tokenizer without a template.
    """
    layout = format if format != "auto" else _layout(row)
    ids, learned = FORMATTERS[layout](row, tokenizer, config)
    num_tokens, data = len(ids), config.data
    if num_tokens > data.max_length:
        if data.truncation in ("drop", "error"):
            raise RowError("too_long", f"{num_tokens} tokens, data.max_length is {data.max_length}")
        keep = slice(None, data.max_length) if data.truncation == "right" else slice(-data.max_length, None)
        ids, learned = ids[keep], learned[keep]
    loss_mask = np.array(learned, dtype=np.uint8)
    loss_mask[:1] = 0
    if not loss_mask.any():
        raise RowError("no_target", f"no token is left to learn ({num_tokens} tokens before truncation)")
    example: Example = {"input_ids": np.array(ids, dtype=np.int32), "loss_mask": loss_mask}
    if num_tokens > data.max_length:
        example["num_truncated"] = np.array([num_tokens - data.max_length], dtype=np.int32)
    return example


def _layout(row: dict[str, Any]) -> str:
    for name, layout in (("messages", "chat"), ("conversations", "chat"), ("prompt", "prompt_completion")):
        if name in row:
            return layout
    return "alpaca" if "instruction" in row else "text"


def _text(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None:
        raise RowError("empty", f"{name} is empty")
    if not isinstance(value, str):
        raise RowError("wrong_type", f"{name} is {type(value).__name__}, not text")
    if not value.strip():
        raise RowError("empty", f"{name} is empty")
    return value


def _plain_text(row: dict[str, Any], tokenizer: Any, config: Any) -> Marked:
    """Text and end token, all of it learned."""
    ids = _tokens(_with_end(_text(row, "text"), tokenizer), tokenizer)
    return ids, [True] * len(ids)


def _prompt_completion(row: dict[str, Any], tokenizer: Any, config: Any) -> Marked:
    if isinstance(row.get("prompt"), list):
        prompt, answer = _messages(row["prompt"]), row.get("completion")
        if not isinstance(answer, list):
            answer = [{"role": "assistant", "content": _text(row, "completion")}]
        return _render(prompt + _messages(answer), row, tokenizer, config, first=len(prompt))
    prompt_text, completion_text = _text(row, "prompt"), _text(row, "completion")
    if chat_template(tokenizer, config) is None:
        return _joined(prompt_text, completion_text, tokenizer, config)
    return _render(_dialogue(row, prompt_text, completion_text), row, tokenizer, config)


def _alpaca(row: dict[str, Any], tokenizer: Any, config: Any) -> Marked:
    output = _text(row, "output")
    if chat_template(tokenizer, config) is None:
        return _joined(_alpaca_prompt(row, is_chat=False), output, tokenizer, config)
    return _render(_dialogue(row, _alpaca_prompt(row, is_chat=True), output), row, tokenizer, config)


def _alpaca_prompt(row: dict[str, Any], *, is_chat: bool) -> str:
    instruction = _text(row, "instruction")
    extra = _text(row, "input") if row.get("input") else ""
    if is_chat:
        return f"{instruction}\n\n{extra}" if extra else instruction
    paired = ", paired with an input that provides further context" if extra else ""
    return ALPACA.format(paired=paired, instruction=instruction, input=f"### Input:\n{extra}\n\n" if extra else "")


def _dialogue(row: dict[str, Any], prompt: str, answer: str) -> Messages:
    system = [{"role": "system", "content": _text(row, "system")}] if row.get("system") else []
    return [*system, {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _chat(row: dict[str, Any], tokenizer: Any, config: Any) -> Marked:
    return _render(_messages(row["messages"] if "messages" in row else row["conversations"]), row, tokenizer, config)


def _messages(value: Any) -> Messages:
    """Checked messages {role, content, …}; ShareGPT's {from, value} is translated. Raises RowError."""
    value = _parsed(value, "messages")
    if not isinstance(value, list):
        raise RowError("wrong_type", f"messages is {type(value).__name__}, not a list")
    if not value:
        raise RowError("empty", "no messages")
    return [_message(message, number) for number, message in enumerate(value, 1)]


def _parsed(value: Any, name: str) -> Any:
    """Lists that a file without lists holds as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise RowError("wrong_type", f"{name} is a text, not a list") from None


def _message(message: Any, number: int) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise RowError("wrong_type", f"message {number} is {type(message).__name__}, not an object")
    if "from" in message and "role" not in message:
        sender = str(message["from"])
        message = {"role": SHAREGPT_ROLES.get(sender, sender), "content": message.get("value")}
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise RowError("unknown_role", f"message {number} has role {str(role)!r:.60}")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if content is None and message.get("tool_calls"):
        content = ""
    if content is not None and not isinstance(content, str):
        raise RowError("wrong_type", f"the content of message {number} is {type(content).__name__}, not text")
    if not (content or "").strip() and not message.get("tool_calls"):
        raise RowError("empty", f"message {number} ({role}) is empty")
    return {name: part for name, part in message.items() if part is not None} | {"content": content}


def _joined(prompt: str, completion: str, tokenizer: Any, config: Any) -> Marked:
    """Prompt and completion without a template; learned from the token on where the prompt alone differs."""
    ids = _tokens(_with_end(prompt + completion, tokenizer), tokenizer)
    start = 0 if config.data.loss_on == "all" else _common(_tokens(prompt, tokenizer), ids)
    return ids, [position >= start for position in range(len(ids))]


def _with_end(text: str, tokenizer: Any) -> str:
    end = tokenizer.eos_token
    return text if end is None or text.endswith(end) else text + end


def _tokens(text: str, tokenizer: Any) -> list[int]:
    return tokenizer(text, verbose=False)["input_ids"]


def _common(prefix: list[int], ids: list[int]) -> int:
    """Number of leading tokens that both share."""
    pairs = enumerate(zip(prefix, ids, strict=False))
    return next((position for position, (a, b) in pairs if a != b), min(len(prefix), len(ids)))


def _render(messages: Messages, row: dict[str, Any], tokenizer: Any, config: Any, *, first: int = 0) -> Marked:
    """The templated conversation. An answer is learned from after its header through its end-of-turn token.

    loss_on assistant: every answer from message `first` on; completion: the last one. Raises RowError.
    """
    template = chat_template(tokenizer, config)
    if template is None:
        raise ConfigError("the tokenizer has no chat template for a chat: give data.chat_template")
    tools = _parsed(row.get("tools") or None, "tools")
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= max(first, 1)]
    if not answers:
        raise RowError("no_answer", "no assistant message answers anything")
    answers = answers if config.data.loss_on == "assistant" else answers[-1:]
    whole = _apply(messages, tokenizer, template, tools=tools)
    if config.data.loss_on == "all":
        ids = tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"]
        return ids, [True] * len(ids)
    prefixes = []
    for i in answers:
        prefixes.append(_apply(messages[:i], tokenizer, template, tools=tools, add_generation_prompt=True))
        prefixes.append(
            whole if i + 1 == len(messages) else _apply(messages[: i + 1], tokenizer, template, tools=tools)
        )
    if not all(whole.startswith(prefix) for prefix in prefixes):
        raise RowError("template", "the chat template renders an answer differently once the conversation goes on")
    texts = list(dict.fromkeys([whole, *prefixes]))
    tokens = dict(zip(texts, tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"], strict=True))
    ids = tokens[whole]
    bounds = [_common(tokens[prefix], ids) for prefix in prefixes]
    learned = [False] * len(ids)
    for start, end in zip(bounds[::2], bounds[1::2], strict=True):
        learned[start:end] = [True] * (end - start)
    return ids, learned


def _apply(messages: Messages, tokenizer: Any, template: str, **options: Any) -> str:
    try:  # in transformers' sandbox
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
    except Exception as error:  # a template can raise anything
        raise RowError("template", f"the chat template refuses the row: {str(error)[:200]}") from None


def chat_template(tokenizer: Any, config: Any) -> str | None:
    """data.chat_template (a template, a file that holds one, or `none`), else the tokenizer's own; None if there is
    none. Raises ConfigError."""
    wanted = config.data.chat_template
    if wanted is None:
        return getattr(tokenizer, "chat_template", None)
    return None if wanted == NO_TEMPLATE else _read_template(wanted)


@lru_cache(maxsize=8)
def _read_template(wanted: str) -> str:
    if "{{" in wanted or "{%" in wanted:
        return wanted
    if not os.path.isfile(wanted):
        raise ConfigError(f"data.chat_template: {wanted[:100]!r} is neither a Jinja template, nor a file, nor none")
    return Path(wanted).read_text(encoding="utf-8")


def render_prompt(prompt: Any, tokenizer: Any, config: Any) -> list[int]:
    """Token ids of a question (text or messages) up to where the answer begins, as in training."""
    template = chat_template(tokenizer, config)
    if isinstance(prompt, str):
        if template is None:
            return _tokens(prompt, tokenizer)
        prompt = [{"role": "user", "content": prompt}]
    if template is None:
        raise ConfigError("the tokenizer has no chat template for a chat: give data.chat_template")
    text = _apply(_messages(prompt), tokenizer, template, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def question(row: dict[str, Any]) -> Any:
    """What a row asks: the messages before the last answer, the prompt, or the first words of a plain text."""
    if "prompt" in row:
        return row["prompt"]
    if "messages" in row or "conversations" in row:
        messages = _messages(row["messages"] if "messages" in row else row["conversations"])
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=len(messages))
        return messages[:last]
    if "instruction" in row:
        return _alpaca_prompt(row, is_chat=True)
    return " ".join(row["text"].split()[:8])


def reference(row: dict[str, Any]) -> Any:
    """What a row answers: the completion, the last answer, the label; None for a plain text."""
    for name in ("completion", "output", "label"):
        if name in row:
            return row[name]
    if "messages" in row or "conversations" in row:
        messages = _messages(row["messages"] if "messages" in row else row["conversations"])
        return next((message["content"] for message in reversed(messages) if message["role"] == "assistant"), None)
    return None


FORMATTERS = {"chat": _chat, "prompt_completion": _prompt_completion, "alpaca": _alpaca, "text": _plain_text}
