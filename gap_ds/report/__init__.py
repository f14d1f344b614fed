"""`gap-ds report`: pictures and figures of runs on one HTML page.

    runs      a run's folder as plain data: results, metrics, history, schedule
    losses    its losses: metrics.jsonl, or a Trainer's log
    build     which pictures a run gets; writes the page and the files beside it
    plots     each picture, from plain numbers
    drawing   colours, axes and legends of all pictures
    page      the HTML

Read `runs` first, then `build`. Nothing here changes a run, and only `plots` and `drawing` need matplotlib.
"""
