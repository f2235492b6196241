"""`skillsd study`: a grid of methods and seeds, each cell an ordinary `skillsd fit`, then one report.

    settings -> cells -> runner                      what to run; what is recorded of a cell; processes, one lock, one time limit
                  |
               results -> comparison -> verdict      run folders as numbers; tests over seeds; sentences that the numbers force
                  |           |            |
                  +-> plots, tables -> report        PNGs, text; report.md and report.html

The unit of every test and interval is the seed.
"""

from skillsd.study.command import study

__all__ = ["study"]
