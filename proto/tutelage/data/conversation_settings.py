"""How rows become prompts, as a setting: the same for who trains, who generates, and who computes signals ahead."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from tutelage.config import Config
from tutelage.data.chat import Chat
from tutelage.data.prompts import Template
from tutelage.errors import ConfigurationError


class ConversationSettings(Config):
    """A template, and what it is given besides a conversation."""

    template: Template = "chat"
    """How a row becomes a prompt: the tokenizer's chat template, or one of those in docs/training.md."""
    chat_template: Path | None = None
    """With `template: chat`: the path of a Jinja file that is used in place of the tokenizer's own chat template."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """What the chat template is given besides the conversation, such as `enable_thinking: false`."""
    teacher_system: str | None = None
    """With `template: chat`: a system message that the teacher reads before each conversation, but not the student. A
    row's own `teacher_prompt` or `teacher_messages` come first."""

    @model_validator(mode="after")
    def _check_chat(self) -> Self:
        if self.template != "chat" and (
            self.chat_template_kwargs or self.teacher_system is not None or isinstance(self.chat_template, Path)
        ):
            raise ValueError(
                f"template: {self.template} is no chat template, so chat_template, chat_template_kwargs and "
                "teacher_system have no meaning; leave them out, or say template: chat"
            )
        return self

    @property
    def chat(self) -> Chat:
        """How conversations are rendered.

        Raises:
            ConfigurationError: the file of the chat template cannot be read.

        """
        text = None
        if isinstance(self.chat_template, Path):
            try:
                text = self.chat_template.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigurationError(f"cannot read {self.chat_template}: {error}", "chat_template") from error
        return Chat(text, self.chat_template_kwargs, self.teacher_system)
