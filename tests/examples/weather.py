"""Four years of Seattle's weather, out of one CSV file by the standard library alone. The data: ../data/README.md."""

import csv
import sys
from datetime import date
from itertools import groupby
from statistics import linear_regression, mean
from typing import NamedTuple


class Day(NamedTuple):
    date: date
    rain: float  # mm, melted snow included
    high: float  # °C
    low: float

    @property
    def warmth(self) -> float:
        return (self.high + self.low) / 2

    @property
    def wet(self) -> bool:
        return self.rain >= 1  # what climatologists call a wet day


def read(path: str) -> list[Day]:
    with open(path, newline="") as file:
        rows = [(date(*map(int, row["date"].split("/"))), row) for row in csv.DictReader(file)]
    return [Day(day, *(float(row[name]) for name in ("precipitation", "temp_max", "temp_min"))) for day, row in rows]


def bar(value: float, unit: float) -> str:
    whole, eighths = divmod(round(value / unit * 8), 8)
    return "█" * whole + " ▏▎▍▌▋▊▉"[eighths].strip()


def sparkline(values: list[float], low: float, high: float) -> str:
    return "".join("▁▂▃▄▅▆▇█"[min(7, int((value - low) / (high - low) * 8))] for value in values)


def longest(days: list[Day], wet: bool) -> list[Day]:
    return max((list(run) for kind, run in groupby(days, lambda day: day.wet) if kind is wet), key=len)


days = read(sys.argv[1] if len(sys.argv) > 1 else "/data/seattle-weather.csv")
years = {year: list(run) for year, run in groupby(days, lambda day: day.date.year)}
print(f"Seattle, {days[0].date} to {days[-1].date}: {len(days)} days\n")

print("     low  high   mean, °C                 rain, mm   wet days")
for number in range(1, 13):
    month = [day for day in days if day.date.month == number]
    low, high, warmth = (mean(getattr(day, name) for day in month) for name in ("low", "high", "warmth"))
    rain, wet = (sum(getattr(day, name) for day in month) / len(years) for name in ("rain", "wet"))
    bars = f"{bar(warmth, 1.2):18} {rain:8.0f} {wet:9.0f} {bar(wet, 1)}"
    print(f"{month[0].date:%b}{low:5.1f} {high:5.1f}  {warmth:5.1f} {bars}")

print("\nWeek by week: mean temperature, and below it rain")
for year, run in years.items():
    weeks = [run[start : start + 7] for start in range(0, 364, 7)]
    print(year, sparkline([mean(day.warmth for day in week) for week in weeks], -3, 26))
    print("    ", sparkline([sum(day.rain for day in week) for week in weeks], 0, 130))

warmest, coldest = max(days, key=lambda day: day.high), min(days, key=lambda day: day.low)
rainiest, dry, wettest = max(days, key=lambda day: day.rain), longest(days, wet=False), longest(days, wet=True)
trend = 365.25 * linear_regression([day.date.toordinal() for day in days], [day.warmth for day in days]).slope
print(f"""
warmest        {warmest.date:%d %b %Y}  {warmest.high:5.1f} °C
coldest        {coldest.date:%d %b %Y}  {coldest.low:5.1f} °C
rainiest       {rainiest.date:%d %b %Y}  {rainiest.rain:5.1f} mm
longest dry    {dry[0].date:%d %b %Y}  {len(dry):3} days in a row, none with 1 mm
longest wet    {wettest[0].date:%d %b %Y}  {len(wettest):3} days in a row
trend          {trend:+.2f} °C a year, though four years are weather and no climate
""")
{
    "days": len(days),
    "mean °C": round(mean(day.warmth for day in days), 1),
    "rain, mm a year": round(sum(day.rain for day in days) / len(years)),
    "wet days a year": round(sum(day.wet for day in days) / len(years)),
}
