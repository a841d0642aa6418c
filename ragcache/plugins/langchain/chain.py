"""What stands where `create_stuff_documents_chain` stood: documents go to the model beside the prompt."""

from __future__ import annotations

from typing import Any

from langchain_core.output_parsers import BaseOutputParser, StrOutputParser
from langchain_core.prompts import BasePromptTemplate
from langchain_core.runnables import Runnable, RunnableLambda

from stemcache.ragcache.plugins.langchain.chat_model import ChatStemcache


def create_documents_chain(
    llm: ChatStemcache,
    prompt: BasePromptTemplate[Any],
    *,
    output_parser: BaseOutputParser[Any] | None = None,
    document_variable_name: str = "context",
) -> Runnable[dict[str, Any], Any]:
    """A chain that answers from the documents in its input's `document_variable_name`.

    prompt: fed with the whole input. It has no place for the documents: they do not become part of it.
    Raises ValueError if it has one.
    """
    if document_variable_name in prompt.input_variables:
        raise ValueError(
            f"take {{{document_variable_name}}} out of the prompt: the documents reach the model beside it, each for "
            "itself, so that they are found in the cache again"
        )
    parser = output_parser or StrOutputParser()

    def answer(inputs: dict[str, Any]) -> Runnable[dict[str, Any], Any]:
        return prompt | llm.bind(documents=inputs[document_variable_name]) | parser

    return RunnableLambda(answer).with_config(run_name="documents_chain")
