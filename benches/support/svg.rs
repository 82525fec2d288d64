//! Bar charts as SVG: one group of bars for each case, a whisker from the lowest to the highest round, the median in words.

use std::fmt::Write as _;

use super::Spread;
use super::results::short;

const WIDTH: f64 = 820.0;
/// Left of the bars: the cases' names.
const LABELS: f64 = 170.0;
/// Right of the longest bar: its value.
const VALUES: f64 = 150.0;
const BAR: f64 = 16.0;
const GAP: f64 = 10.0;
const HEAD: f64 = 64.0;
/// Told apart also in grey.
const COLOURS: [&str; 4] = ["#1f6f8b", "#f2a541", "#8b3a62", "#7a9e7e"];

/// See the module's documentation.
pub(crate) struct Chart {
    pub(crate) title: String,
    /// Unit of all values.
    pub(crate) unit: &'static str,
    /// What the bars of a group are; none of it is shown when there is one.
    pub(crate) series: Vec<&'static str>,
    /// Each case and its bars, one for each of the series.
    pub(crate) groups: Vec<(String, Vec<Option<Spread>>)>,
    /// A line at this value: what is to be reached.
    pub(crate) mark: Option<f64>,
    /// Each bar's length is the value's logarithm, for values that lie far apart.
    pub(crate) logarithmic: bool,
}

impl Chart {
    pub(crate) fn render(&self) -> String {
        let bars = self.series.len() as f64;
        let group = bars * BAR + GAP;
        let height = HEAD + group * self.groups.len() as f64 + GAP;
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
             <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#fff\"/>\n\
             <text x=\"12\" y=\"24\" font-size=\"16\">{}</text>\n",
            escaped(&self.title)
        );
        self.legend(&mut out);
        for (index, (name, values)) in self.groups.iter().enumerate() {
            let top = HEAD + group * index as f64;
            let middle = top + bars * BAR / 2.0 + 4.0;
            let x = LABELS - 8.0;
            let name = escaped(name);
            line(
                &mut out,
                &format!("<text x=\"{x}\" y=\"{middle:.1}\" text-anchor=\"end\">{name}</text>"),
            );
            for (series, value) in values.iter().enumerate() {
                if let Some(value) = value {
                    let top = top + BAR * series as f64;
                    self.bar(&mut out, top, COLOURS[series % COLOURS.len()], *value);
                }
            }
        }
        if let Some(mark) = self.mark {
            let x = self.x(mark);
            line(
                &mut out,
                &format!(
                    "<path d=\"M{x:.1} {:.1}V{:.1}\" stroke=\"#333\" stroke-dasharray=\"4 3\"/>",
                    HEAD - 4.0,
                    height - GAP
                ),
            );
        }
        out + "</svg>\n"
    }

    fn legend(&self, out: &mut String) {
        if self.series.len() < 2 {
            return;
        }
        for (index, name) in self.series.iter().enumerate() {
            let x = LABELS + 150.0 * index as f64;
            let colour = COLOURS[index % COLOURS.len()];
            line(
                out,
                &format!(
                    "<rect x=\"{x}\" y=\"38\" width=\"12\" height=\"12\" fill=\"{colour}\"/><text x=\"{}\" y=\"48\">{}</text>",
                    x + 18.0,
                    escaped(name)
                ),
            );
        }
    }

    fn bar(&self, out: &mut String, top: f64, colour: &str, value: Spread) {
        let (low, median, high) = (self.x(value.low), self.x(value.median), self.x(value.high));
        let (width, middle) = ((median - LABELS).max(0.5), top + BAR / 2.0);
        let end = middle - 3.0;
        let whisker = if low < high {
            format!(
                "<path d=\"M{low:.1} {middle:.1}H{high:.1}M{low:.1} {end:.1}v6M{high:.1} {end:.1}v6\" stroke=\"#333\"/>"
            )
        } else {
            String::new()
        };
        line(
            out,
            &format!(
                "<rect x=\"{LABELS}\" y=\"{:.1}\" width=\"{width:.1}\" height=\"{:.1}\" fill=\"{colour}\"/>\
                 {whisker}<text x=\"{:.1}\" y=\"{:.1}\">{} {}</text>",
                top + 1.0,
                BAR - 2.0,
                high.max(median) + 6.0,
                middle + 4.0,
                short(value.median),
                escaped(self.unit),
            ),
        );
    }

    /// Where a value ends.
    fn x(&self, value: f64) -> f64 {
        let all = self.groups.iter().flat_map(|(_, values)| values).flatten();
        let (least, most) = all
            .flat_map(|spread| [spread.low, spread.high])
            .chain(self.mark)
            .filter(|value| *value > 0.0)
            .fold((f64::MAX, f64::MIN_POSITIVE), |(least, most), value| {
                (least.min(value), most.max(value))
            });
        let share = if self.logarithmic {
            // One decade below the least, so that its bar is to be seen.
            let zero = least.log10().floor() - 1.0;
            (value.max(least).log10() - zero) / (most.log10() - zero)
        } else {
            value / most
        };
        LABELS + share.clamp(0.0, 1.0) * (WIDTH - LABELS - VALUES)
    }
}

fn line(out: &mut String, text: &str) {
    writeln!(out, "{text}").expect("a String takes everything");
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}
