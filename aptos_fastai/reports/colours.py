"""Colours of the pages.

The grades are ordered by viridis (van der Walt and Smith 2015), which colour-blind readers can order, too: the higher
the grade, the further from the background in lightness. Each colour differs from it by a contrast of 3 or more.
"""
LIGHT_PAGE, DARK_PAGE = '#ffffff', '#16191d'
GRADES_LIGHT = '#1e9c89', '#287c8e', '#375b8d', '#453581', '#460a5d'           # of grades 0 … 4 on a light page
GRADES_DARK = '#2c728e', '#1f968b', '#37b878', '#89d548', '#f6e620'            # on a dark page
BLUE, GREEN, ORANGE, RED = '#3b82c4', '#2a9d76', '#dc6f2e', '#c93a5b'          # of things that have no order
