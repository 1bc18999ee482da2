"""Work in steps: a session keeps variables, functions and imports from call to call, also over an error.

To run it: python tests/examples/session.py
"""

import anyio

from sandbox_runner import load_config, open_runner

STEPS = (
    "import math\nradii = [1, 2, 3]",
    "def area(radius):\n    return math.pi * radius**2",
    "[round(area(radius), 2) for radius in radii]",
    "area('four')",  # fails, and the variables are still there
    "radii.append(4)\nround(area(radii[-1]), 2)",
)


async def main() -> None:
    async with open_runner(load_config()) as runner:
        for step in STEPS:
            result = await runner.execute(step, session="circles")
            print(">>>", step.replace("\n", "\n... "))
            if result.exception:
                print(f"{result.exception.type} on line {result.exception.line}, state {result.state}")
            elif result.value is not None:
                print(result.value)
        await runner.close_session("circles")  # or leave it: it waits for the next program that asks for it


anyio.run(main)
