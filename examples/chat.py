"""A conversation: each answer becomes a part of the next prompt.

python examples/chat.py [MODEL]
"""

import sys

from tinyvllm import LLM

QUESTIONS = ["Tell me a story about a brave fox.", "Tell me a story about a sleepy owl."]


def main() -> None:
    llm = LLM(*sys.argv[1:])
    params = llm.get_default_sampling_params()  # of the model's generation_config.json
    params.max_tokens = 80
    messages = []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        (output,) = llm.chat(messages, params, use_tqdm=False)
        answer = output.outputs[0]
        messages.append({"role": "assistant", "content": answer.text})
        print(f"> {question}\n{answer.text}")
        print(
            f"[{len(output.prompt_token_ids)} prompt tokens, {output.num_cached_tokens} of them "
            f"cached; {len(answer.token_ids)} new ones, ended by {answer.finish_reason}]\n"
        )


if __name__ == "__main__":
    main()
