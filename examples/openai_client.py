"""Ask a running server (`stemcache serve`) twice about the same documents: the second time they are already read.

Needs the openai package: pip install openai
"""

from openai import OpenAI

DOCUMENTS = [
    {"title": "The harbor Velmora", "text": "The code of Velmora is 7392. The keeper of Velmora is Drasten. " * 3},
    {"title": "The tower Kabrin", "text": "The colour of Kabrin is teal. The weight of Kabrin is 214 kg. " * 3},
]

with OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="not needed") as client:
    model = client.models.list().data[0].id
    for question in ("What is the code of Velmora?", "What is the colour of Kabrin?"):
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            extra_body={"documents": DOCUMENTS},
        )
        print(question, answer.choices[0].message.content)
        print(
            f"  {answer.usage.prompt_tokens_details.cached_tokens} of {answer.usage.prompt_tokens} tokens were cached"
        )
