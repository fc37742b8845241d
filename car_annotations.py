"""Print what cars_annos.mat says as JSON: [[path, class, x1, y1, x2, y2], ...], [name of class 1, ...].

    python car_annotations.py /home/data/car/cars_annos.mat

data_utils.py calls this in a process of its own: the reader of scipy can crash on a damaged file, or ask for any amount
of memory, and nobody knows who made the file.
"""
import json
import resource
import sys

import numpy as np
from scipy.io import loadmat

MEMORY = 4 * 2**30  # bytes; the file of the data set needs 200 MB, most of it the libraries


def main() -> None:
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    contents = loadmat(sys.argv[1])
    rows = [[str(row['relative_im_path'].item()), int(row['class'].item()),
             *(int(row[f'bbox_{edge}'].item()) for edge in ('x1', 'y1', 'x2', 'y2'))]
            for row in contents['annotations'].reshape(-1)]
    names = [str(name.item()) for name in contents.get('class_names', np.empty(0)).reshape(-1)]
    json.dump([rows, names], sys.stdout)


if __name__ == '__main__':
    main()
