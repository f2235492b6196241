"""Steps per second of the Sokoban environment on one core, text observation included.

    python -m benchmarks.sokoban_steps [--turns N] [--runs N]

Each run plays the same random moves on levels of the default training split; the median over runs counts. The bar is 100,000 steps/s.
"""

import argparse
import random
import statistics
import time

import gymnasium as gym

BAR = 100_000
CASES = {
    "fenced": {},
    "bare": {"action_format": "bare"},
    "bare, separator ' '": {"action_format": "bare", "separator": " "},
    "fenced, long answers": {"prefix": "The box on the left has to go one cell up, so I walk around it first. "},
    "fenced, own template": {"prompts": {"observation": "Turn {turn}, {turns_left} left.\n{board}"}},
    "fenced, shaped reward": {"distance_reward": 0.1},
}


def steps_per_second(turns: int, prefix: str = "", **arguments) -> float:
    """Steps/s over about `turns` steps; resets are not timed."""
    env = gym.make("skillsd_sokoban:skillsd/Sokoban-v0", max_turns=1000, **arguments)
    fence = "" if arguments.get("action_format") == "bare" else "```"
    chance = random.Random(0)
    answers = [f"{prefix}{fence}{chance.choice(('up', 'down', 'left', 'right'))}{fence}" for _ in range(1000)]
    tasks = env.unwrapped.tasks("train")
    done = spent = 0
    episode = 0
    while done < turns:
        env.reset(options={"task_id": tasks[episode % len(tasks)]["task_id"]})
        episode += 1
        over = False
        start = time.perf_counter()
        for answer in answers:
            _, _, terminated, truncated, _ = env.step(answer)
            done += 1
            if over := terminated or truncated:
                break
        spent += time.perf_counter() - start
        assert over
    return done / spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=100_000, help="steps a run")
    parser.add_argument("--runs", type=int, default=5, help="runs, of which the median counts")
    given = parser.parse_args()
    print(f"| case | steps/s (median of {given.runs}) | slowest | fastest | bar {BAR:,} |")
    print("|---|---:|---:|---:|---|")
    for name, arguments in CASES.items():
        rates = [steps_per_second(given.turns, **arguments) for _ in range(given.runs)]
        median = statistics.median(rates)
        print(f"| {name} | {median:,.0f} | {min(rates):,.0f} | {max(rates):,.0f} | {'met' if median >= BAR else 'missed'} |")


if __name__ == "__main__":
    main()
