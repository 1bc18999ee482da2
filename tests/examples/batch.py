"""Check many untrusted answers, each in a fresh container, a few at a time.

To run it: python tests/examples/batch.py
"""

import anyio

from sandbox_runner import Result, load_config, open_runner

ANSWERS = {  # what somebody handed in for "write median(numbers)"
    "ada": "def median(numbers):\n    import statistics\n    return statistics.median(numbers)",
    "bob": "def median(numbers):\n    return sorted(numbers)[len(numbers) // 2]",
    "eve": "def median(numbers):\n    while True: pass",
    "joe": "def median(numbers)\n    return 3",
}
TEST = "\n\nassert median([3, 1, 2]) == 2\nassert median([1, 2, 3, 4]) == 2.5, 'an even number of numbers'"


def verdict(result: Result) -> str:
    """A word on a result: that the code failed is no exception here, but a status."""
    if result.status == "ok":
        return "right"
    if result.status == "error" and result.exception:
        return f"wrong: {result.exception.type}: {result.exception.message}"
    return f"wrong: {result.message}"  # took too long, too much memory, or its process with it


async def main() -> None:
    verdicts = {}
    async with open_runner(load_config()) as runner:
        at_once = anyio.CapacityLimiter(2)

        async def check(name: str, answer: str) -> None:
            async with at_once:
                verdicts[name] = verdict(await runner.execute(answer + TEST, timeout=2))

        async with anyio.create_task_group() as tasks:
            for name, answer in ANSWERS.items():
                tasks.start_soon(check, name, answer)
    for name in ANSWERS:
        print(f"{name}: {verdicts[name]}")


anyio.run(main)
