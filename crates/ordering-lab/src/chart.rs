//! The errors of each experiment as an SVG chart.

use crate::report::{Errors, Report, Verdict};
use std::fmt::Write as _;

const WIDTH: i32 = 760;
const LEFT: i32 = 150;
const RIGHT: i32 = 90;
const TOP: i32 = 56;
const BAR: i32 = 9;
const ROW: i32 = 44;
const KINDS: [(&str, &str); 3] =
    [("order errors", "#c0392b"), ("value errors", "#e08e0b"), ("consumer errors", "#2c6fbb")];

/// The chart; each bar's length is the square root of its number, so that a few errors can be seen beside many.
pub(crate) fn svg(reports: &[Report]) -> String {
    let rows: Vec<(&Report, &Errors)> =
        reports.iter().filter_map(|report| Some((report, report.errors.as_ref()?))).collect();
    let numbers = |errors: &Errors| [errors.order, errors.value, errors.consumer];
    let most = rows.iter().flat_map(|(_, errors)| numbers(errors)).max().unwrap_or(0).max(1);
    let length = |count: i64| ((count as f64 / most as f64).sqrt() * f64::from(WIDTH - LEFT - RIGHT)).round() as i32;
    let height = TOP + ROW * rows.len() as i32 + 16;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"13\" role=\"img\">\n\
         <title>Errors by experiment</title>\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#ffffff\"/>\n\
         <text x=\"12\" y=\"22\" font-size=\"15\" font-weight=\"bold\" fill=\"#222222\">Errors by experiment \
         <tspan font-size=\"11\" font-weight=\"normal\">(bars as long as the square root of the number)</tspan></text>\n"
    );
    let mut line = |text: std::fmt::Arguments<'_>| writeln!(svg, "{text}").expect("writing to a string can't fail");
    for (index, (name, colour)) in KINDS.into_iter().enumerate() {
        let x = LEFT + 140 * index as i32;
        line(format_args!("<rect x=\"{x}\" y=\"34\" width=\"11\" height=\"11\" fill=\"{colour}\"/>"));
        line(format_args!("<text x=\"{}\" y=\"44\" fill=\"#222222\">{name}</text>", x + 16));
    }
    for (row, (report, errors)) in rows.into_iter().enumerate() {
        let y = TOP + ROW * row as i32 + 6;
        let mark = if matches!(report.verdict, Verdict::AsExpected) { "" } else { " (!)" };
        line(format_args!(
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\" fill=\"#222222\">{}{mark}</text>",
            LEFT - 10,
            y + 19,
            report.experiment
        ));
        for (index, (count, (_, colour))) in numbers(errors).into_iter().zip(KINDS).enumerate() {
            let y = y + (BAR + 2) * index as i32;
            let width = length(count).max(1);
            line(format_args!("<rect x=\"{LEFT}\" y=\"{y}\" width=\"{width}\" height=\"{BAR}\" fill=\"{colour}\"/>"));
            line(format_args!(
                "<text x=\"{}\" y=\"{}\" font-size=\"10\" fill=\"#444444\">{count}</text>",
                LEFT + width + 5,
                y + BAR
            ));
        }
    }
    svg.push_str("</svg>\n");
    svg
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experiment::Experiment;

    #[test]
    fn the_chart_shows_each_experiment_that_counts_errors() {
        let report = |experiment, errors| Report { errors, ..Report::new(experiment, 1) };
        let many = Errors { order: 100, value: 25, consumer: 0 };
        let chart = svg(&[
            report(Experiment::Competing, Some(many)),
            report(Experiment::Balance, None),
            report(Experiment::Sequenced, Some(Errors::NONE)),
        ]);
        assert!(chart.contains(">competing<") && chart.contains(">sequenced<") && !chart.contains(">balance<"));
        let full = WIDTH - LEFT - RIGHT;
        assert!(
            chart.contains(&format!("width=\"{full}\" height=\"{BAR}\"")),
            "the largest is as long as there's room"
        );
        assert!(chart.contains(&format!("width=\"{}\" height=\"{BAR}\"", full / 2)), "a quarter of it is half as long");
        assert_eq!(chart.matches('<').count(), chart.matches('>').count());
    }
}
