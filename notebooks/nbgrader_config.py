"""nbgrader's settings for the lessons: copy this file into the folder of a course, beside source/.

The notebooks in notebooks/ are assignments as they are, with blanks in the cells for answers. So nbgrader is not to clear
these cells, as it does with notebooks that hold the solutions.
"""

from nbgrader.converters.generate_assignment import GenerateAssignment
from nbgrader.preprocessors import ClearSolutions

c = get_config()  # noqa: F821  defined by nbgrader
c.GenerateAssignment.preprocessors = [
    step for step in GenerateAssignment.preprocessors.default() if step is not ClearSolutions
]
c.ExecutePreprocessor.timeout = 300  # seconds a cell
